"""Compares a model of ours with timm's twin: keys, logits, maps and gradients, in float64."""

import torch
from torch import Tensor, nn


def share_weights(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both in float64 and evaluation, with the same random weights, loaded strictly in both directions."""
    ours, theirs = ours.double().eval(), theirs.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # none stays 0, as gates and last norms of residuals begin
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def assert_same_function(ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> None:
    """To 1e-9 relative: logits and maps in evaluation, loss and gradients in training.

    Where timm's model has more maps than ours, those before ours (of its stem) are left out.
    """
    ours, theirs = share_weights(ours, theirs)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(ours(x), theirs(x), "logits")
        close(ours.forward_features(x), theirs.forward_features(x), "features")
        if hasattr(theirs, "forward_intermediates"):  # ConViT since timm 1.0.31
            maps, expected_maps = (m.forward_intermediates(x, intermediates_only=True) for m in (ours, theirs))
            for i, (actual, expected) in enumerate(zip(maps, expected_maps[-len(maps) :], strict=True)):
                close(actual, expected, f"map {i}")
    losses = [model.train()(x).square().sum() for model in (ours, theirs)]
    close(*losses, "loss")
    for loss in losses:
        loss.backward()
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        close(gradients[key].grad, parameter.grad, key)


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    # The second term: a gradient that is 0 in exact arithmetic, such as that of a bias before a batch norm.
    assert (actual - expected).norm() <= 1e-9 * expected.norm() + 1e-12, what
