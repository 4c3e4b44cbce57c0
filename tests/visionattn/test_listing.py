"""`visionattn list` and `visionattn.listing.list_models`: a table that is true of the models, at no cost."""

import json
import subprocess
import sys

import pytest
import timm
import torch

import visionattn  # noqa: F401 - registers the models
from visionattn.cli import main
from visionattn.errors import UserError
from visionattn.listing import describe, list_models, our_models

SMALL = ("ninformer_tiny_patch4_32", "va_xcit_nano_12_p16_224", "nat_mini")
TABLE = {model.name: model for model in list_models()}


# The table


def test_every_registered_model_has_a_row_and_no_row_is_without_one():
    assert list(TABLE) == our_models()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in our_models()])
def test_a_row_is_what_the_model_says(name):
    """If not: `python -m visionattn.listing > visionattn/models.json`."""
    assert TABLE[name] == describe(name)


@pytest.mark.parametrize("name", ["davit_tiny", "xcit_nano_12_p16_224", "convit_tiny", "halonet26t", "volo_d1_224"])
def test_figures_are_those_of_timms_twin(name):
    with torch.device("meta"):
        twin = timm.create_model(name)
    row = TABLE[f"va_{name}"]
    assert row.parameters == sum(p.numel() for p in twin.parameters())
    assert row.input_size == twin.pretrained_cfg["input_size"]
    assert row.weights[f"va_{name}.{twin.pretrained_cfg['tag']}"].endswith(twin.pretrained_cfg["hf_hub_id"])


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),  # tables of the papers
    [("biformer_tiny", 13, 2.2), ("nat_mini", 20, 2.7), ("dinat_large", 200, 30.6), ("crossformer_small", 30.7, 4.9)],
)
def test_figures_are_those_of_the_papers(name, parameters, gmacs):
    assert TABLE[name].parameters / 1e6 == pytest.approx(parameters, rel=0.02)
    assert TABLE[name].gmacs == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_strides_and_channels_are_those_of_the_maps(name):
    maps = timm.create_model(name, features_only=True).eval()(torch.zeros(1, 3, 64, 64))
    assert tuple(m.shape[1] for m in maps) == TABLE[name].channels
    assert tuple(64 // m.shape[2] for m in maps) == TABLE[name].strides


def test_weights_are_those_that_timm_fetches():
    for row in TABLE.values():
        assert row.pretrained == timm.is_model_pretrained(row.name)
        assert set(row.weights) == set(timm.list_pretrained(f"{row.name}.*")), row.name
        assert all(address.startswith("https://") for address in row.weights.values())
        if row.weights:
            assert next(iter(row.weights)) == f"{row.name}.{timm.get_pretrained_cfg(row.name).tag}"


def test_what_we_did_not_write_from_a_paper_alone_says_what_it_equals():
    for row in TABLE.values():
        assert bool(row.sameness) != row.origin.startswith("https://arxiv.org/"), row.name
    assert "golden records biformer_stl_nchw, biformer_stl_nchw_micro" in TABLE["biformer_stl_nchw"].sameness
    assert TABLE["va_davit_huge"].sameness == "timm's davit_huge"


# Asking it


def names(pattern: str = "*", **filters) -> list[str]:
    return [model.name for model in list_models(pattern, **filters)]


def test_filters_narrow_what_a_pattern_matches():
    assert set(list_models("nat_*")) > set(list_models("nat_m*"))
    assert names("biformer_[st]*") == ["biformer_small", "biformer_stl", "biformer_stl_nchw", "biformer_tiny"]
    assert names("nat_*", max_params=30) == ["nat_isotropic_small", "nat_mini", "nat_tiny"]
    assert names("nat_*", min_params=25, max_params=30) == ["nat_tiny"]
    assert set(names(licence="BSD")) == set(names("ninformer*")) == set(names(licence="bsd-?-clause"))
    assert set(names("*halonet*", pretrained=True)) == {"va_halonet26t", "va_halonet50ts", "va_sehalonet33ts"}


def test_bounds_are_of_the_exact_number_and_included():
    exact = TABLE["nat_mini"].parameters / 1e6
    assert names("nat_mini", min_params=exact, max_params=exact) == ["nat_mini"]
    with pytest.raises(UserError):
        names("nat_mini", max_params=exact - 1e-6)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("biformr_tiny", "biformer_tiny"),
        ("NAT_mini", "nat_mini"),
        ("davit_tiny", "va_davit_tiny"),
        ("volo*", "va_volo_d1_224"),
        ("zzz*", "families: agent_cswin, agent_deit"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_by_the_nearest_names(pattern, hint, refused):
    told = refused("list", pattern)
    assert repr(pattern) in told
    assert hint in told


def test_filters_that_leave_nothing_say_what_there_is(refused):
    told = refused("list", "biformer*", "--max-params", 0, "--pretrained")
    assert "at most 0 M parameters and published weights" in told
    assert "13.14 to 56.80 M" in told
    assert "a licence like 'gpl'" in refused("list", "--licence", "gpl")
    assert "at least 2000 M" in refused("list", "--min-params", 2000)


def test_the_command_line_has_the_same_filters(capsys):
    assert (
        main(["list", "*nat_tiny", "--min-params", "25", "--max-params", "30", "--licence", "mit", "--pretrained"]) == 0
    )
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["dinat_tiny", "nat_tiny"]


def test_details_are_the_provenance_of_a_model(capsys):
    assert main(["list", "dinat_large", "--details"]) == 0
    told = capsys.readouterr().out
    for fact in (
        "200.94 M (200,943,514)",
        "30.46 for an image of 3x224x224",
        "strides 4, 8, 16, 32; channels 192, 384, 768, 1536",
        "dinat_large.in22k_ft_in1k_384: https://huggingface.co/shi-labs/dinat-large-in22k-in1k-384",
        "mit",
        "https://arxiv.org/abs/2209.15001",
        "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "golden records dinat_micro",
    ):
        assert fact in told


@pytest.mark.parametrize("name", ["emcad_pvt_v2_b0", "va_halonet_h0"])
def test_details_say_what_a_model_has_not(name, capsys):
    assert main(["list", name, "--details"]) == 0
    told = capsys.readouterr().out
    assert "none to fetch" in told
    assert "written from the paper" in told


def test_decoders_are_listed_by_pattern(capsys, refused):
    assert main(["list", "--decoders", "unet*"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["unet", "unetplusplus"]
    assert "upernet" in refused("list", "--decoders", "upernt")
    assert "--decoders" in refused("list", "--decoders", "--pretrained")


def test_listing_imports_neither_torch_nor_timm():
    code = (
        "import sys, json; from visionattn.cli import main; assert main(['list']) == 0; "
        "assert main(['list', 'nat_mini', '--details']) == 0; "
        "print(json.dumps([name for name in ('torch', 'timm', 'numpy') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *told, loaded = result.stdout.splitlines()
    assert len(told) > len(TABLE)
    assert json.loads(loaded) == []


def test_a_reader_that_ends_early_gets_no_traceback():
    listing = [sys.executable, "-m", "visionattn", "list"]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "visionattn: stopped, since what read the output has ended\n"
    assert process.returncode == 141
