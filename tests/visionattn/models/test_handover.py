"""Weights of a run of any task start any other: what is taken, what is new, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from visionattn.errors import UserError
from visionattn.models.detectors import make_detector
from visionattn.models.handover import about, save_backbone, start_from
from visionattn.models.networks import make_network, started, statistics_of
from visionattn.models.pretrainers import make_pretrainer
from visionattn.models.segmenters import make_segmenter
from visionattn.recipe.sections import Bands, Model

NAME = "biformer_tiny"
TINY = {"depth": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "head_dim": 8, "n_win": 2, "topks": [1, 2, 4, -2]}
RECIPE = """\
task: pretraining
model: {name: biformer_tiny}
data: {format: geotiff, mean: [0.1, 0.2, 0.3], std: [1, 2, 3], bands: [4, 3, 2]}
"""


def network(task: str, channels: int = 3, **options: object) -> nn.Module:
    arguments = {**TINY, **options}
    if task == "classification":
        return timm.create_model(NAME, in_chans=channels, num_classes=5, **arguments)
    if task == "segmentation":
        return make_segmenter(NAME, "fpn", 4, channels, encoder_args=arguments)
    if task == "detection":
        return make_detector(NAME, "fcos", 3, channels, args=arguments, detector_args={"fpn_channels": 32, "convs": 1})
    return make_pretrainer(Model(name=NAME, args=arguments), channels, (64, 64), "mim")


def backbone(made: nn.Module) -> nn.Module:
    return made.encoder.model if hasattr(made, "encoder") else made


def saved(made: nn.Module, path: Path) -> Path:
    """A checkpoint as a run has it, whose weights are not those that a network begins with."""
    for key, value in made.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if "running_var" in key else -0.5))
    state = {f"network.{key}": value for key, value in made.state_dict().items()}
    torch.save({"state_dict": state, "visionattn": {"format": 2, "recipe": RECIPE, "unit_range": False}}, path)
    return path


TASKS = ["classification", "segmentation", "detection", "pretraining"]


@pytest.mark.parametrize("new", TASKS)
@pytest.mark.parametrize("old", TASKS)
def test_every_task_starts_from_every_other(old, new, tmp_path):
    source, made = network(old), network(new)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    line = start_from(made, saved(source, tmp_path / "old.ckpt"), NAME, TINY)
    given, taken = backbone(source).state_dict(), backbone(made).state_dict()
    behind = {"norm", "head"}  # the last map: encoders have none
    shared = [key for key in given.keys() & taken.keys() if "running" not in key or "pretraining" not in (old, new)]
    assert len(shared) > 50
    assert all(torch.equal(given[key], taken[key]) for key in shared)
    assert {key.split(".")[0] for key in taken.keys() - given.keys()} <= behind
    if old != new:
        above = [key for key in before if not key.startswith(("encoder.", "clean.")) and hasattr(made, "encoder")]
        assert all(torch.equal(before[key], made.state_dict()[key]) for key in above)
    assert f"{tmp_path / 'old.ckpt'}: " in line
    assert "tensors of biformer_tiny taken" in line
    assert ("nothing is new" in line) == (old == new)


def test_the_maps_of_a_segmenter_are_those_of_the_pretrained_backbone(tmp_path):
    source, made = network("pretraining").eval(), network("segmentation").eval()
    start_from(made, saved(source, tmp_path / "old.ckpt"), NAME, TINY)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), source.cleaned():
        expected = source.encoder.model.forward_intermediates(images, intermediates_only=True)
        for mine, theirs in zip(made.encoder(images), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_a_backbone_alone_has_plain_keys_and_says_where_it_is_from(tmp_path):
    source = network("segmentation")
    save_backbone(source, saved(source, tmp_path / "best.ckpt"))
    file = tmp_path / "backbone.safetensors"
    with safe_open(file, "pt") as content:
        assert set(content.keys()) == set(source.encoder.model.state_dict())
        assert json.loads(content.metadata()["visionattn"])["recipe"] == RECIPE
    told = about(file)
    assert (told.mean, told.std, told.bands, told.unit_range) == ([0.1, 0.2, 0.3], [1, 2, 3], [4, 3, 2], False)
    made = network("classification")
    line = start_from(made, file, NAME, TINY)
    assert "new: norm, head of 5 classes" in line
    assert torch.equal(made.downsample_layers[0][0].weight, source.encoder.model.downsample_layers[0][0].weight)


def test_a_file_of_timm_starts_it_too(tmp_path):
    source = network("classification")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert about(tmp_path / "model.safetensors") is None
    assert "left out: head" in start_from(network("segmentation"), tmp_path / "model.safetensors", NAME, TINY)


def test_another_backbone_is_refused_by_name(tmp_path):
    path = saved(network("pretraining"), tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"old\.ckpt: not a checkpoint of nat_mini but of biformer_tiny: missing"):
        start_from(timm.create_model("nat_mini", depths=(1, 1, 1, 1)), path, "nat_mini", {"depths": (1, 1, 1, 1)})
    with pytest.raises(UserError, match=r"missing: .*stages\.2\.1\."):
        start_from(network("segmentation", depth=[1, 1, 2, 1]), path, NAME, {**TINY, "depth": [1, 1, 2, 1]})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoints/best\.ckpt in it; expected a run directory"):
        start_from(network("classification"), tmp_path, NAME, TINY)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_another_number_of_channels_is_refused_unless_bands_are_named(task, tmp_path):
    path = saved(network("pretraining", 3), tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"takes 3 channels, but the images have 5 .*model\.bands"):
        start_from(network(task, 5), path, NAME, TINY)
    with pytest.raises(UserError, match=r"model\.bands\.target has 2 names, but the images have 5 channels"):
        start_from(network(task, 5), path, NAME, TINY, Bands(source=["r", "g", "b"], target=["r", "g"]))


def test_bands_of_one_name_keep_their_kernels(tmp_path):
    source, made = network("pretraining", 3), network("segmentation", 5)
    bands = Bands(source=["red", "green", "blue"], target=["nir", "blue", "green", "red", "swir"])
    line = start_from(made, saved(source, tmp_path / "old.ckpt"), NAME, TINY, bands)
    assert "blue from blue, green from green, red from red, nir, swir from the mean of red, green, blue" in line
    old, new = (backbone(x).downsample_layers[0][0].weight for x in (source, made))
    factor = new[:, 3] / old[:, 0]
    torch.testing.assert_close(factor, factor[0, 0, 0].expand_as(factor))
    torch.testing.assert_close(new[:, 1], old[:, 2] * factor[0, 0, 0])
    torch.testing.assert_close(new[:, 0], old.mean(1) * factor[0, 0, 0])


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection", "pretraining"])
def test_published_weights_take_other_bands_by_name(task, monkeypatch):
    """Their download is replaced here."""
    published = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(published))
    bands = Bands(source=["red", "green", "blue"], target=["nir", "blue", "green", "red"])
    spec = Model(name="resnet18", pretrained=True, bands=bands)
    if task == "classification":
        made = make_network(spec, 5, 4, (64, 64))
    elif task == "pretraining":
        made = make_pretrainer(spec, 4, (64, 64), "mim")
    elif task == "segmentation":
        made = started(make_segmenter("resnet18", "fpn", 4, 4, pretrained=True), spec, {})
    else:
        made = started(make_detector("resnet18", "fcos", 3, 4, pretrained=True), spec, {})
    assert (
        "published weights of resnet18; bands: blue from blue, green from green, red from red, nir from" in made.start
    )
    old, new = published["conv1.weight"], backbone(made).conv1.weight
    factor = new[0, 3, 0, 0] / old[0, 0, 0, 0]
    torch.testing.assert_close(new[:, 1:], old.flip(1) * factor)
    torch.testing.assert_close(new[:, 0], old.mean(1) * factor)
    torch.testing.assert_close(backbone(made).layer1[0].conv1.weight, published["layer1.0.conv1.weight"])


def test_names_of_bands_are_of_something(tmp_path):
    with pytest.raises(UserError, match=r"neither model\.checkpoint nor model\.pretrained: true"):
        make_network(Model(name=NAME, args=TINY, bands=Bands()), 5, 4, (64, 64))
    assert statistics_of(Model(name="resnet18", pretrained=True), 3, unit_range=True)
    assert not statistics_of(Model(name="resnet18", pretrained=True, bands=Bands()), 3, unit_range=True)


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (3, 13), (13, 3), (13, 1), (4, 5)])
def test_activations_keep_their_size_whatever_the_bands(before, now, tmp_path):
    source, made = network("classification", before), network("classification", now)
    line = start_from(made, saved(source, tmp_path / "old.ckpt"), NAME, TINY, Bands())
    assert "bands: " in line
    grey = torch.randn(4, 1, 64, 64)
    sizes = []
    for x, bands in ((source, before), (made, now)):
        convolution = x.downsample_layers[0][0]
        sizes.append((convolution(grey.expand(-1, bands, -1, -1)) - convolution.bias[:, None, None]).std())
    torch.testing.assert_close(*sizes, rtol=1e-3, atol=0)
