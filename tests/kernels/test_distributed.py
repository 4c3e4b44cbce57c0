"""Every pattern under DistributedDataParallel: two processes give the gradients of one with the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visionattn import kernels

HEADS, DIM, SIDE = 2, 16, 6
CALLS = {
    "agent": lambda q, k, v: kernels.agent_attention(q, k, v, q[:, ::3, ::3].flatten(1, 2)),
    "channel": lambda q, k, v: kernels.channel_attention(q, k, v, HEADS),
    "cross_covariance": lambda q, k, v: kernels.cross_covariance_attention(q, k, v, torch.ones(HEADS, 1, 1)),
    "gated": lambda q, k, v: kernels.gated_positional_attention(
        q, k, v, torch.zeros(HEADS, SIDE**2, SIDE**2), torch.zeros(HEADS)
    ),
    "halo": lambda q, k, v: kernels.halo_attention(q, k, v, 3, 1),
    "neighborhood": lambda q, k, v: kernels.neighborhood_attention(q, k, v, 3),
    "outlook": lambda q, k, v: kernels.outlook_attention(v.new_zeros(len(v), SIDE, SIDE, HEADS, 9, 9), v, 3),
    "routing": lambda q, k, v: kernels.routing_attention(q, k, v, 3, 2),
    "window": lambda q, k, v: kernels.window_attention(q, k, v, 3, 1),
}


class Layers(nn.Module):
    """A projection and each pattern, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for name in CALLS})

    def forward(self, x: Tensor) -> Tensor:
        for name, call in CALLS.items():
            x = x + call(*self.projections[name](x).unflatten(-1, (3, HEADS, DIM)).unbind(3)).flatten(3)
        return x


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    model(images).square().mean().backward()
    return [p.grad for p in model.parameters()]


def make_inputs() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Layers().double(), torch.randn(4, SIDE, SIDE, HEADS * DIM, dtype=torch.float64)


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, images = make_inputs()
    actual = gradients(DistributedDataParallel(model), images[2 * rank : 2 * rank + 2])
    torch.save(actual, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    expected = gradients(*make_inputs())
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
