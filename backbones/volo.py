"""VOLO: outlook attention at fine resolution, then a plain transformer, and a class token that reads the result.

Yuan et al., VOLO: Vision Outlooker for Visual Recognition, 2021, https://arxiv.org/abs/2106.13112. Same functions,
argument names and state-dict keys as timm's `volo_*`, from https://github.com/sail-sg/volo (both Apache-2.0). Special:
- one stage at stride 8, whose attention weights are projected from each position and need no keys; three at stride 16;
- two class attention blocks: only the class token asks, and only it changes;
- token labelling (Jiang et al., https://arxiv.org/abs/2104.10858): a second head classifies every token; its largest
  logits are added to those of the class token. See `VOLO.forward_train`.

Any size of image: where a convolution's stride does not divide a map, the map is zero padded at its end, so that no
pixel is lost. The position embedding is stretched over the image, see `position_embedding` in layers.py.

Maps are (B, H, W, C), tokens (B, 1 + H * W, C) with the class token first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    get_device_dtype,
    register_notrace_module,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, twin_cfgs, unwrap
from visionattn.backbones.backbone import TokenClassifier, create
from visionattn.backbones.layers import (
    Mlp,
    channels_last,
    check_image_size,
    check_in_chans,
    conv_norm,
    init_linear,
    linear,
    pad_to_multiple,
    position_embedding,
)
from visionattn.kernels import outlook_attention, routing_attention
from visionattn.kernels._packed import unpack

__all__ = ["VOLO"]

STRIDE = 16  # of the tokens that have a position embedding
Box = tuple[int, int, int, int]  # top, left, bottom, right, in tokens


@register_notrace_module
class OutlookAttention(nn.Module):
    """Outlook attention on a map (B, H, W, dim), its weights projected from the means of stride x stride positions."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.stride = num_heads, kernel_size, stride
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        v = linear(self.v, x).unflatten(-1, (self.num_heads, -1))
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, ceil_mode=True).permute(0, 2, 3, 1)
        logits = linear(self.attn, means).unflatten(-1, (self.num_heads, self.kernel_size**2, self.kernel_size**2))
        return linear(self.proj, outlook_attention(logits, v, self.kernel_size, self.stride).flatten(3))


@register_notrace_module
class Attention(nn.Module):
    """Every token of a map (B, H, W, dim) attends to every other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1).flatten(3))


@register_notrace_module
class ClassAttention(nn.Module):
    """The class token attends to itself and all others: tokens (B, N, dim) -> (B, 1, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = linear(self.q, x[:, :1, None]).unflatten(-1, (self.num_heads, -1))
        k, v = unpack(linear(self.kv, x[:, :, None]).unflatten(-1, (2, self.num_heads, -1)))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1)[:, :, 0].flatten(2))


class Block(nn.Module):
    """Attention and MLP, each with a residual: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ClassBlock(Block):
    """The same for the class token alone; the others pass: (B, N, dim) -> (B, N, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.drop_path1(self.attn(self.norm1(x)))
        token = token + self.drop_path2(self.mlp(self.norm2(token)))
        return torch.cat([token, x[:, 1:]], 1)


@register_notrace_module
class Stem(nn.Sequential):
    """Image (B, in_chans, H, W) -> map (B, dim, H / 2, W / 2), rounded up, in channels-last memory."""

    def __init__(self, in_chans: int, dim: int) -> None:
        convs = [nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)]
        convs += [nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2)]
        super().__init__(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True))))

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        layers = iter(self)
        for conv, norm, act in zip(layers, layers, layers, strict=True):
            x = act(conv_norm(x, conv, norm))
        return x


class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, H / 8, W / 8, dim), rounded up."""

    def __init__(self, in_chans: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = Stem(in_chans, hidden_dim)
        self.proj = nn.Conv2d(hidden_dim, dim, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(pad_to_multiple(self.conv(x), 4)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Map (B, H, W, source) -> (B, H / 2, W / 2, target), rounded up."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(source, target, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(pad_to_multiple(x.permute(0, 3, 1, 2), 2)).permute(0, 2, 3, 1)


class VOLO(TokenClassifier):
    """VOLO for classification, and as a backbone with maps at strides 8, 16, 16 and 16.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        layers: blocks of each of the four stages; the first has outlook attention.
        embed_dims, num_heads: channels and heads of each stage; the last three stages have the same channels.
        global_pool: `token` (the class token), `avg` (all tokens), `ggem` (all others) or "" (no pooling).
        stem_hidden_dim: channels of the convolutions that make patches.
        img_size: the size that the position embedding is made for; any other size works too.
        drop_rate, pos_drop_rate: dropout before the head, and after the position embedding.
        use_aux_head: a head that classifies all tokens. Its largest logit of each class, halved, is added to that of
            the pooled features.
        return_all: when training, `forward` is `forward_train`.
        use_mix_token: when training, `forward_train` mixes pairs of images.
    """

    pos_embed: nn.Parameter | None
    post_network: nn.ModuleList | None
    aux_head: nn.Linear | None
    norm: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        stem_hidden_dim: int = 64,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_aux_head: bool = True,
        return_all: bool = False,
        use_mix_token: bool = False,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if return_all and not (use_aux_head and num_classes and global_pool == "token"):
            raise ValueError(
                f"return_all=True with use_aux_head={use_aux_head}, num_classes={num_classes}, global_pool="
                f"{global_pool!r}: expected the auxiliary head, at least 1 class and global_pool='token'"
            )
        if use_mix_token and not return_all:
            raise ValueError("use_mix_token=True needs return_all=True: the loss must know the mixed box")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.return_all, self.mix_token, self.use_aux_head = return_all, use_mix_token, use_aux_head
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.set_pool(global_pool)
        self.stage_ends = [0, 2, 3, 4]  # in network, which has a downsampling after the first stage
        self.feature_info = [
            {"num_chs": dim, "reduction": 16 if end else 8, "module": f"network.{end}"}
            for dim, end in zip(embed_dims, self.stage_ends, strict=True)
        ]
        self.patch_embed = PatchEmbed(in_chans, stem_hidden_dim, embed_dims[0])
        self.pos_embed = nn.Parameter(torch.zeros(1, *_table_size(img_size), embed_dims[-1]))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = [drop_path_rate * i / (sum(layers) - 1) for i in range(sum(layers))]
        rates[: layers[0]] = [0.0] * layers[0]  # as in timm: outlook attention is never dropped
        self.network = nn.ModuleList()
        for stage, (depth, dim, heads) in enumerate(zip(layers, embed_dims, num_heads, strict=True)):
            attention = Attention if stage else OutlookAttention
            first = sum(layers[:stage])
            blocks = [Block(dim, attention(dim, heads), mlp_ratio, rates[first + i]) for i in range(depth)]
            self.network.append(nn.Sequential(*blocks))
            if stage == 0:
                self.network.append(Downsample(dim, embed_dims[1]))
        dim, heads = embed_dims[-1], num_heads[-1]
        self.post_network = nn.ModuleList(ClassBlock(dim, ClassAttention(dim, heads), mlp_ratio) for _ in range(2))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.aux_head = nn.Linear(dim, num_classes) if use_aux_head and num_classes else None
        self.norm = nn.LayerNorm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks: list[tuple] = [(r"^network\.(\d+)", None)]
        if not coarse:
            blocks = [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,))]
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": blocks,
            "class_blocks": [(r"^post_network\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position embedding for images of another size, as a new parameter."""
        if self.pos_embed is None:  # pruned
            return
        table = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), _table_size(img_size))
        self.pos_embed = nn.Parameter(table.clone(), self.pos_embed.requires_grad)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones for num_classes, or by nothing for 0; global_pool "" leaves tokens."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = None
        if self.use_aux_head and num_classes:
            self.aux_head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)).train(self.training)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        return self._stages(self.patch_embed(images), _size(images))

    def _stages(self, x: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Patches of an image of `size` -> the map of each stage, and the normalised tokens."""
        for stage in self.network:
            if isinstance(stage, Downsample):
                x = self.pos_drop(stage(x) + position_embedding(self.pos_embed, *size, STRIDE))
                continue
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            yield x
        x = x.flatten(1, 2)
        if self.post_network is not None and self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            for block in self.post_network:
                x = block(x)
        yield self.norm(x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the maps of all stages but the first."""
        return self.norm(x) if norm and stage else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        end = self.stage_ends[stages - 1]
        cut = end + 1 < len(self.network)
        self.network = self.network[: end + 1]
        if end == 0:
            self.pos_embed = None
        if norm or end == 0:
            self.norm = nn.Identity()
        if head or cut:
            self.post_network = self.cls_token = None
            self.use_aux_head = self.return_all = False
            self.reset_classifier(0, "")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x
        if self.global_pool:
            pooled = x[:, 0] if self.global_pool == "token" else x.mean(1) if self.ggem is None else self.ggem(x[:, 1:])
        pooled = self.head_drop(pooled)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None and self.global_pool:
            logits = logits + 0.5 * self.aux_head(self.head_drop(x)[:, 1:]).amax(1)
        return logits

    def forward_train(self, x: Tensor) -> tuple[Tensor, Tensor, Box]:
        """What token labelling is trained on.

        Returns:
            Logits of the class token (B, num_classes), of the other tokens (B, H' * W', num_classes), H' and W' being H
            and W / 16 rounded up, and a box (top, left, bottom, right) in tokens. With `use_mix_token` the box holds,
            in every image, the tokens of the image at the same position of the reversed batch: the label of the class
            token is a mixture by area. The logits of tokens are put back to their own image. Without, it is empty.
        """
        if self.aux_head is None:
            raise ValueError("forward_train needs the auxiliary head: use_aux_head=True and at least 1 class")
        check_image_size(x)
        size = _size(x)
        x = self.patch_embed(x)
        h, w = (-(-side // STRIDE) for side in size)
        box = _random_box(h, w) if self.mix_token and self.training else (0, 0, 0, 0)
        top, left, bottom, right = box
        x = _mix(x, (2 * top, 2 * left, 2 * bottom, 2 * right))
        *_, x = self._stages(x, size)
        x = self.head_drop(x)
        tokens = self.aux_head(x[:, 1:]).unflatten(1, (h, w))
        return self.head(x[:, 0]), _mix(tokens, box).flatten(1, 2), box

    def forward(  # type: ignore[override]  # token labelling trains on more than logits
        self, x: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Box]:
        if self.return_all and self.training:
            return self.forward_train(x)
        return self.forward_head(self.forward_features(x))


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _table_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = to_2tuple(img_size)
    if min(size) < 32:
        raise ValueError(f"img_size={img_size}: expected at least 32 x 32 pixels")
    return size[0] // STRIDE, size[1] // STRIDE


def _random_box(height: int, width: int) -> Box:
    """A box of a uniformly distributed share of the map, around a uniformly distributed position, cut at its border."""
    side = float(torch.rand(()).sqrt())
    cuts = []
    for length in (height, width):
        cut, centre = int(length * side), int(torch.randint(0, length, ()))
        cuts.append((max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, length)))
    (top, bottom), (left, right) = cuts
    return top, left, bottom, right


def _mix(x: Tensor, box: Box) -> Tensor:
    """Maps (B, H, W, C) with the box of the maps of the reversed batch; twice gives the maps back."""
    top, left, bottom, right = box
    mixed = x.clone()
    mixed[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return mixed


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VOLO) -> dict[str, Tensor]:
    """The authors' or timm's checkpoint, bare or wrapped; the position embedding is resampled to the model's size.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = dict(unwrap(state_dict))
    table = state_dict.get("pos_embed")
    if table is not None and model.pos_embed is not None:
        state_dict["pos_embed"] = resample_abs_pos_embed_nhwc(table, list(model.pos_embed.shape[1:3]))
    check_checkpoint(state_dict, model, r"network\.\d+\.\d+\.")
    return state_dict


SIZES = {"d1": (224, 384), "d2": (224, 384), "d3": (224, 448), "d4": (224, 448), "d5": (224, 448, 512)}
default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for depth, sizes in SIZES.items()
        for size in sizes
        for name, cfg in twin_cfgs(
            f"volo_{depth}_{size}",
            fixed_input_size=False,
            pool_size=(size // STRIDE, size // STRIDE),
            origin_url="https://github.com/sail-sg/volo",
            paper_name="VOLO: Vision Outlooker for Visual Recognition",
            paper_ids="arXiv:2106.13112",
        ).items()
    }
)

D1 = {"layers": (4, 4, 8, 2), "embed_dims": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)}
D2 = {"layers": (6, 4, 10, 4), "embed_dims": (256, 512, 512, 512), "num_heads": (8, 16, 16, 16)}
D3 = {**D2, "layers": (8, 8, 16, 4)}
D4 = {"layers": (8, 8, 16, 4), "embed_dims": (384, 768, 768, 768), "num_heads": (12, 16, 16, 16)}
D5 = {**D4, "layers": (12, 12, 20, 4), "mlp_ratio": 4.0, "stem_hidden_dim": 128}


def _create_volo(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(VOLO, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def va_volo_d1_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """26.6 M parameters."""
    return _create_volo("va_volo_d1_224", pretrained, **{**D1, **kwargs})


@register_model
def va_volo_d1_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """26.8 M parameters."""
    return _create_volo("va_volo_d1_384", pretrained, **{**D1, "img_size": 384, **kwargs})


@register_model
def va_volo_d2_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """58.7 M parameters."""
    return _create_volo("va_volo_d2_224", pretrained, **{**D2, **kwargs})


@register_model
def va_volo_d2_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """58.9 M parameters."""
    return _create_volo("va_volo_d2_384", pretrained, **{**D2, "img_size": 384, **kwargs})


@register_model
def va_volo_d3_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """86.3 M parameters."""
    return _create_volo("va_volo_d3_224", pretrained, **{**D3, **kwargs})


@register_model
def va_volo_d3_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """86.6 M parameters."""
    return _create_volo("va_volo_d3_448", pretrained, **{**D3, "img_size": 448, **kwargs})


@register_model
def va_volo_d4_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """193.0 M parameters."""
    return _create_volo("va_volo_d4_224", pretrained, **{**D4, **kwargs})


@register_model
def va_volo_d4_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """193.4 M parameters."""
    return _create_volo("va_volo_d4_448", pretrained, **{**D4, "img_size": 448, **kwargs})


@register_model
def va_volo_d5_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """295.5 M parameters."""
    return _create_volo("va_volo_d5_224", pretrained, **{**D5, **kwargs})


@register_model
def va_volo_d5_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """295.9 M parameters."""
    return _create_volo("va_volo_d5_448", pretrained, **{**D5, "img_size": 448, **kwargs})


@register_model
def va_volo_d5_512(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """296.1 M parameters."""
    return _create_volo("va_volo_d5_512", pretrained, **{**D5, "img_size": 512, **kwargs})
