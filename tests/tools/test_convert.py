"""Weights under other key names: the authors', ours and timm's, there and back in equal bits."""

import pytest
import timm
import torch
from golden_records import NAMES, filled_state_dict, load_record
from safetensors.torch import load_file
from test_golden import MODELS

import visionattn  # noqa: F401 - registers the models
from visionattn import UserError
from visionattn.cli import main
from visionattn.tools.convert import to_authors, to_ours, to_timm

MICRO = [name for name in NAMES if "micro" in name and load_record(name)["reference"]["class"] in MODELS]

FAST = ("biformer_micro", "dinat_micro", "ninformer_micro", "patchconvnet_micro_multi")


def both(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Our network and the authors' state dict of a golden record."""
    record = load_record(name)
    model, arguments = MODELS[record["reference"]["class"]](record["reference"]["kwargs"])
    if "features_only" in arguments:
        pytest.skip("a backbone under a dense head")
    return timm.create_model(model, **arguments), {k: v.float() for k, v in filled_state_dict(record).items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MICRO])
def test_the_authors_names_there_and_back(name):
    network, theirs = both(name)
    ours = to_ours(theirs, network)
    network.load_state_dict(ours)
    other = {key: torch.randn(value.shape) for key, value in theirs.items()}
    back = to_authors(dict(network.state_dict()), network, other)
    assert list(back) == list(theirs)
    kept = {key: other[key] for key in theirs if not torch.equal(back[key], theirs[key])}
    same = to_ours(theirs | kept, network)  # which they have no part in
    assert all(torch.equal(same[key], ours[key]) for key in ours)


def test_what_is_computed_has_no_way_back(tmp_path, refused):
    small, large = (timm.create_model("va_volo_d1_224", img_size=size, layers=(1, 1, 1, 1)) for size in (224, 160))
    with pytest.raises(UserError, match="pos_embed is computed from the authors' weights"):
        to_authors(dict(large.state_dict()), large, dict(small.state_dict()))


def test_weights_of_another_network_are_refused():
    network = timm.create_model("va_xcit_nano_12_p16_224")
    with pytest.raises(UserError, match=r"the weights are not those of XCiT"):
        to_ours({"stem.weight": torch.zeros(3)}, network)
    with pytest.raises(UserError, match="timm has no network of its own like nat_mini"):
        to_timm({}, "nat_mini")


def test_files(tmp_path, refused):
    ours = timm.create_model("va_xcit_nano_12_p16_224").eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "ours.pth")
    words = ["convert", tmp_path / "ours.pth", tmp_path / "timm.safetensors", "--model", "va_xcit_nano_12_p16_224"]
    assert main([*map(str, words), "--to", "timm"]) == 0
    theirs = timm.create_model("xcit_nano_12_p16_224").eval()
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    assert "never overwritten" in refused(*words, "--to", "timm")
    words[2] = tmp_path / "new.pth"
    assert "unknown key names; did you mean ours?" in refused(*words, "--to", "our")
    assert "--like FILE" in refused(*words, "--to", "authors")
    assert not (tmp_path / "new.pth").exists()
