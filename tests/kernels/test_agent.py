"""agent_attention against its definition written as loops, and its misuse."""

import itertools

import pytest
import torch
from torch import Tensor

from visionattn.kernels import agent_attention


def make_inputs(batch, size, keys, heads, dim, agents, dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens, key_tokens = (int(torch.tensor(x).prod()) for x in (size, keys))
    return {
        "q": draw(batch, *size, heads, dim),
        "k": draw(batch, *keys, heads, dim),
        "v": draw(batch, *keys, heads, dim),
        "agents": draw(batch, agents, heads, dim),
        "agent_bias": draw(heads, agents, key_tokens),
        "query_bias": draw(heads, tokens, agents),
    }


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("size", "keys"), [((7,), (7,)), ((3, 5), (3, 5)), ((3, 5), (2, 2))])
def test_it_follows_the_definition(size, keys, backend):
    inputs = make_inputs(2, size, keys, 2, 4, agents=3)
    q, k, v = (inputs[name].flatten(1, -3) for name in "qkv")
    expected = torch.zeros_like(q)
    for image, head in itertools.product(range(2), range(2)):
        gathered = []
        for i, agent in enumerate(inputs["agents"][image, :, head]):
            logits = [0.3 * (agent @ key) for key in k[image, :, head]]
            gathered.append((torch.stack(logits) + inputs["agent_bias"][head, i]).softmax(0) @ v[image, :, head])
        for i, query in enumerate(q[image, :, head]):
            logits = [0.3 * (query @ agent) for agent in inputs["agents"][image, :, head]]
            shares = (torch.stack(logits) + inputs["query_bias"][head, i]).softmax(0)
            expected[image, i, head] = shares @ torch.stack(gathered)
    output = agent_attention(**inputs, scale=0.3, backend=backend)
    torch.testing.assert_close(output, expected.view(inputs["q"].shape), rtol=1e-12, atol=1e-12)


MISUSE = [
    ({"q": torch.zeros(2, 6, 16)}, r"q is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"k": torch.zeros(2, 3, 3, 4, 8)}, r"k is .*: expected the shape \(2, 3, 3, 2, 8\)"),
    ({"v": torch.zeros(2, 3, 4, 2, 8)}, r"v is .*: expected the shape \(2, 3, 3, 2, 8\)"),
    ({"agents": torch.zeros(2, 2, 2, 2, 8)}, r"agents is .*: expected a floating tensor of \(B, L, heads, head_dim\)"),
    ({"agents": torch.zeros(1, 4, 2, 8)}, r"agents is .*: expected the shape \(2, 4, 2, 8\)"),
    ({"agent_bias": torch.zeros(2, 4, 36)}, r"agent_bias is .*: expected the shape \(2, 4, 9\)"),
    ({"query_bias": torch.zeros(2, 4, 36)}, r"query_bias is .*: expected the shape \(2, 36, 4\)"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    inputs = make_inputs(2, (6, 6), (3, 3), 2, 8, agents=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        agent_attention(**inputs | change)
