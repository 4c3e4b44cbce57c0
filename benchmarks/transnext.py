"""TransNeXt beside the structure that the authors' code has: neighbours by unfold, biases gathered from a table.

`python benchmarks/transnext.py [--model transnext_micro] [--sizes 224 512] [--batch 1] [--rounds 5]` prints time of the
process on one thread, one call of each in turn (median), and the peak of the resident set above what was there before,
for inference and a training step without the optimizer. Both have the same weights; their outputs are compared first.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionattn  # noqa: F401, registers the models
from visionattn.backbones import transnext
from visionattn.tools.benchmark import PASSES, peak_memory, take_turns


class Aggregated(transnext.AggregatedAttention):
    """By unfold: of each position its neighbours' keys and values are copied (B, heads, N, head_dim, 9)."""

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        batch, height, width, dim = x.shape
        heads, places, window = self.num_heads, height * width, self.window_size**2
        keys = self._pooled(height), self._pooled(width)
        q = F.normalize(self.q(x).view(batch, places, heads, -1).transpose(1, 2), dim=-1)
        inside, log_keys = transnext._inside(q, height, width, self.window_size, keys[0] * keys[1], q.dtype)
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * log_keys.flatten(0, 1)
        k, v = self.kv(x).flatten(1, 2).chunk(2, -1)
        k = F.normalize(k.reshape(batch, places, heads, -1), dim=-1).flatten(2)
        around = F.unfold(torch.cat([k, v], -1).mT.reshape(batch, 2 * dim, height, width), self.window_size, padding=1)
        k, v = around.view(batch, 2 * heads, -1, window, places).permute(0, 1, 4, 2, 3).chunk(2, 1)
        near = (scaled[..., None, :] @ k).squeeze(-2) + self.relative_pos_bias_local[:, None]
        near = near.masked_fill(~inside.flatten(0, 1), -torch.inf)
        pooled = F.adaptive_avg_pool2d(self.act(self.sr(x.permute(0, 3, 1, 2).contiguous())), keys)
        pooled = self.kv(self.norm(pooled.flatten(2).mT)).view(batch, -1, 2 * heads, dim // heads).transpose(1, 2)
        pooled_k, pooled_v = pooled.chunk(2, 1)
        far = scaled @ F.normalize(pooled_k, dim=-1).mT + _bias(self, x, keys)
        weights = torch.cat([near, far], -1).softmax(-1)
        near, far = weights.split([window, weights.shape[-1] - window], -1)
        near = near + q @ self.learnable_tokens + self.learnable_bias
        mixed = (near[..., None, :] @ v.mT).squeeze(-2) + far @ pooled_v
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class Global(transnext.GlobalAttention):
    """Softmax of all products."""

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3 * self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, 1)
        log_keys = torch.tensor(height * width, dtype=q.dtype).log()
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * log_keys
        weights = (q @ F.normalize(k, dim=-1).mT + _bias(self, x, (height, width))).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def _bias(layer: transnext.CosineAttention, x: Tensor, keys: tuple[int, int]) -> Tensor:
    """(heads, N, keys): the table of all distances goes through the layer's MLP, and each pair takes its row."""
    axes = [transnext._steps(x, x.shape[1 + i], keys[i], layer.side[i], x.dtype) for i in (0, 1)]
    (rows, row_of), (columns, column_of) = axes
    pairs = torch.cartesian_prod(rows, columns)
    table = layer.cpb_fc2(F.relu(layer.cpb_fc1(pairs))).T
    row_of, column_of = row_of.view(-1, 1, keys[0], 1), column_of.view(1, -1, 1, keys[1])
    index = (row_of * len(columns) + column_of).flatten(2).flatten(0, 1)
    return table[:, index.flatten()].view(-1, *index.shape)


def model(name: str, unfolded: bool) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name)
    for layer in made.modules():
        if unfolded and isinstance(layer, transnext.CosineAttention):
            layer.__class__ = Global if isinstance(layer, transnext.GlobalAttention) else Aggregated
    return made


def call(name: str, unfolded: bool, step: str, batch: int, size: int) -> Callable[[], Any]:
    made = model(name, unfolded).train(step == PASSES[1])
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))

    def inference() -> Any:
        with torch.inference_mode():
            return made(images)

    def training() -> Any:
        made.zero_grad(set_to_none=True)
        made(images).square().mean().backward()

    return training if made.training else inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="transnext_micro")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        kinds = {"unfold": True, "visionattn": False}
        rest = (arguments.batch, size)
        ours, theirs = (call(arguments.model, unfolded, PASSES[0], *rest)() for unfolded in (False, True))
        print(f"{size} px: outputs differ by {(ours - theirs).abs().max() / theirs.abs().max():.1e} of the largest")
        for step in PASSES:
            calls = {kind: call(arguments.model, unfolded, step, *rest) for kind, unfolded in kinds.items()}
            times = {
                kind: statistics.median(values) for kind, values in take_turns(calls, arguments.rounds, "cpu").items()
            }
            peaks = {
                kind: peak_memory("cpu", call, arguments.model, unfolded, step, *rest)
                for kind, unfolded in kinds.items()
            }
            print(
                f"{size} px, {step}: {times['unfold']:.0f} -> {times['visionattn']:.0f} ms, "
                f"{times['unfold'] / times['visionattn']:.2f} times as fast; "
                f"{peaks['unfold']:.0f} -> {peaks['visionattn']:.0f} MiB, {peaks['visionattn'] / peaks['unfold']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
