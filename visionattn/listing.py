"""`visionattn list`: every model of ours with its size, cost, weights, licence and paper; every decoder and detector.

What is listed stands in `models.json`, so that listing imports neither torch nor timm. After a change of a model:
`python -m visionattn.listing > visionattn/models.json`, in a clone.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionattn.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ModelInfo",
    "decoder_table",
    "describe",
    "detector_table",
    "format_details",
    "format_table",
    "gmacs",
    "list_models",
    "our_models",
]

AGENT = "agent_transformer/models"  # a folder of the authors'

# Classes of the authors' code, as tests/golden names them, that models equal: the first pattern that fits the name
REFERENCES = {
    "biformer_stl_nchw": ["nchwBiFormerSTL"],
    "biformer_stl": ["BiFormerSTL"],
    "biformer_*": ["BiFormer", "BiFormer_mm"],
    "crossformer*": ["CrossFormer", "models.crossformer_backbone_seg.CrossFormer"],
    "flowformer": ["Flowformer_CV/flowformer.py Flowformer"],
    "lgvit_*": ["SAM/LGViT.py LGViT"],
    "*nat_isotropic_*": ["NATIsotropic"],
    "vitrpb_*": ["NATIsotropic"],
    "dinat_s_*": ["DiNAT_s"],
    "dinat_*": ["DiNAT"],
    "nat_*": ["NAT"],
    "patchconvnet_*": ["PatchConvnet"],
    "agent_deit_*": [f"{AGENT}/agent_deit.py VisionTransformer"],
    "agent_pvt_*": [f"{AGENT}/agent_pvt.py PyramidVisionTransformer"],
    "agent_swin_*": [f"{AGENT}/agent_swin.py AgentSwinTransformer"],
    "agent_cswin_*": [f"{AGENT}/agent_cswin.py CSWinTransformer"],
    "moh_*": ["MoH-ViT/transnext.py TransNeXt"],
    "rmt_*": [
        "classfication_release/RMT.py VisRetNet",
        "classfication_release/RMT.py VisRetNet (RMT_T3)",
        "classification_token_label_release/RMT.py VisRetNet",
        "segmentation/mmseg/models/backbones/RMT.py RMT",
    ],
    "transnext_*": ["TransNeXt", "segmentation TransNeXt"],
    "ninformer_*": ["train.NiNformerImageClassification"],
}


@dataclass(frozen=True)
class ModelInfo:
    """One model that `timm.create_model(name)` makes once visionattn is imported."""

    name: str
    parameters: int
    gmacs: float
    """Multiply-accumulates of one image of `input_size`, in 1e9."""
    input_size: tuple[int, int, int]
    """Channels, height and width (pixels) that its figures are for."""
    strides: tuple[int, ...]
    """Pixels between places of each map that `features_only=True` gives; empty for a whole segmenter."""
    channels: tuple[int, ...]
    """Of these maps."""
    weights: dict[str, str] = field(hash=False)
    """Published weights: name for `timm.create_model(..., pretrained=True)` -> address. The first is the default."""
    licence: str
    """Of the weights; without any, of the code."""
    paper: str
    """Its identifier, such as arXiv:2303.08810."""
    title: str
    """Of the paper."""
    origin: str
    """Address of the authors' code; of the paper where we wrote the model from that alone."""
    family: str
    """Name of its file in backbones/, without .py."""
    note: str
    """Such as the accuracy that its authors state."""
    sameness: str
    """What it is proved equal to, in float64 to 1e-9; empty where there is nothing to compare with."""

    @property
    def pretrained(self) -> bool:
        return bool(self.weights)


def list_models(
    pattern: str = "*",
    *,
    min_params: float | None = None,
    max_params: float | None = None,
    licence: str | None = None,
    pretrained: bool = False,
) -> list[ModelInfo]:
    """Our models whose name matches a shell pattern, in timm's order.

    Args:
        pattern: such as `biformer*`; the whole name has to match.
        min_params, max_params: bounds of the number of parameters, in millions.
        licence: part of the licence's name, or a shell pattern for a part; upper and lower case are the same.
        pretrained: only models with published weights.

    Raises UserError where no model is left.
    """
    for name, value, kind in (("pattern", pattern, str), ("licence", licence or "", str)):
        if not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}: expected a text")
    for name, bound in (("min_params", min_params), ("max_params", max_params)):
        if bound is not None and not isinstance(bound, int | float):
            raise UserError(f"{name} is {bound!r}: expected a number, in millions")
    models = [ModelInfo(**row) for row in _table()]
    named = [model for model in models if fnmatchcase(model.name, pattern)]
    if not named:
        families = sorted({model.family for model in models})
        raise _no_match("model", pattern, [model.name for model in models], f"families: {', '.join(families)}")
    wanted: dict[str, Callable[[ModelInfo], bool]] = {}
    if min_params is not None:
        wanted[f"at least {min_params:g} M parameters"] = lambda model: model.parameters >= min_params * 1e6
    if max_params is not None:
        wanted[f"at most {max_params:g} M parameters"] = lambda model: model.parameters <= max_params * 1e6
    if licence is not None:
        part = f"*{licence.lower()}*"
        wanted[f"a licence like {licence!r}"] = lambda model: fnmatchcase(model.licence.lower(), part)
    if pretrained:
        wanted["published weights"] = lambda model: model.pretrained
    left = [model for model in named if all(has(model) for has in wanted.values())]
    if not left:
        sizes = [model.parameters / 1e6 for model in named]
        raise UserError(
            f"none of the {len(named)} models that {pattern!r} matches has {' and '.join(wanted)}: they have "
            f"{min(sizes):.2f} to {max(sizes):.2f} M parameters, {sum(m.pretrained for m in named)} have published "
            f"weights, licences are {', '.join(sorted({m.licence for m in named}))}"
        )
    return left


def _table() -> list[dict[str, Any]]:
    rows = json.loads(resources.files("visionattn").joinpath("models.json").read_text("utf-8"))
    return [{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows]


def _no_match(kind: str, pattern: str, names: Collection[str], otherwise: str) -> UserError:
    word = re.sub(r"[*?!\[\]]", "", pattern).lower()
    inside = [name for name in names if word and word in name][:3]
    hint = f"; nearest: {', '.join(inside)}" if inside else nearest(word, names, most=3, cutoff=0.5)
    return UserError(f"no {kind} matches {pattern!r}{hint or f'; {otherwise}'}")


def format_table(models: list[ModelInfo]) -> str:
    """Aligned text with a row for each model, and a heading."""
    rows = [("model", "M params", "GMACs", "input", "pretrained", "licence", "paper")]
    for m in models:
        weights = "yes" if m.pretrained else "no"
        rows.append((m.name, f"{m.parameters / 1e6:.2f}", f"{m.gmacs:.2f}", _size(m), weights, m.licence, m.paper))
    return _aligned(rows)


def format_details(models: list[ModelInfo]) -> str:
    """A paragraph for each model: all that is known about it."""
    return "\n\n".join(_details(model) for model in models)


def _details(m: ModelInfo) -> str:
    weights = [f"{name}: {address}" for name, address in m.weights.items()] or [
        'none to fetch; a file that you have: pretrained=True, pretrained_cfg_overlay={"file": PATH}'
    ]
    features = "none: a whole segmenter"
    if m.strides:
        features = f"strides {', '.join(map(str, m.strides))}; channels {', '.join(map(str, m.channels))}"
    rows = [
        ("parameters", f"{m.parameters / 1e6:.2f} M ({m.parameters:,})"),
        ("GMACs", f"{m.gmacs:.2f} for an image of {_size(m)}"),
        ("features", features),
        ("weights", weights[0]),
        *[("", other) for other in weights[1:]],
        ("licence", m.licence),
        ("note", m.note or "-"),
        ("paper", f"{m.title}, https://arxiv.org/abs/{m.paper.removeprefix('arXiv:')}"),
        ("origin", m.origin),
        ("file", f"backbones/{m.family}.py"),
        ("sameness", m.sameness or "no reference to compare with: written from the paper"),
    ]
    return f"{m.name}\n{_aligned([('', *row) for row in rows])}"


def _size(model: ModelInfo) -> str:
    return "x".join(map(str, model.input_size))


def decoder_table(pattern: str = "*") -> str:
    """Aligned text of the decoders whose name matches a shell pattern, with a heading; UserError where none does."""
    from visionattn.models.segmenters import DECODERS  # which imports segmentation_models_pytorch

    rows = [(name, decoder.description) for name, decoder in DECODERS.items() if fnmatchcase(name, pattern)]
    if not rows:
        raise _no_match("decoder", pattern, list(DECODERS), f"decoders: {', '.join(DECODERS)}")
    return _aligned([("decoder", ""), *rows])


def detector_table(pattern: str = "*") -> str:
    """As `decoder_table`, of the detectors."""
    from visionattn.models.detectors import DETECTORS  # which imports torchvision

    rows = [(name, detector.description) for name, detector in DETECTORS.items() if fnmatchcase(name, pattern)]
    if not rows:
        raise _no_match("detector", pattern, list(DETECTORS), f"detectors: {', '.join(DETECTORS)}")
    return _aligned([("detector", ""), *rows])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# What the table is made from: the models


def our_models() -> list[str]:
    """Names of the models that this package registers in timm, in its order."""
    import timm

    import visionattn.backbones  # noqa: F401  registers the models

    return [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("visionattn.backbones.")]


def gmacs(model: "nn.Module", input_size: tuple[int, int, int]) -> float:
    """Multiply-accumulates of one image, in 1e9; attention in its unfused form, since fused operators are opaque."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from visionattn.kernels import set_backend

    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), set_backend("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops() / 2e9


def describe(name: str) -> ModelInfo:
    """A model's row, from the model itself, on the meta device, so nothing is allocated; in a clone only."""
    import timm
    import torch
    from timm.models import get_arch_pretrained_cfgs

    from visionattn.backbones.encoder_decoder import EncoderDecoder

    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
        whole = isinstance(model, EncoderDecoder)
        maps: Any = None if whole else timm.create_model(name, features_only=True).feature_info
    cfg = model.pretrained_cfg
    published = [item for item in get_arch_pretrained_cfgs(name).items() if item[1].has_weights]
    published.sort(key=lambda item: item[1].tag != cfg["tag"])
    return ModelInfo(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        gmacs=round(gmacs(model, cfg["input_size"]), 6),
        input_size=tuple(cfg["input_size"]),
        strides=tuple(maps.reduction()) if maps else (),
        channels=tuple(maps.channels()) if maps else (),
        weights={key: f"https://huggingface.co/{c.hf_hub_id}" if c.hf_hub_id else str(c.url) for key, c in published},
        licence=cfg["license"],
        paper=cfg["paper_ids"],
        title=cfg["paper_name"],
        origin=cfg["origin_url"],
        family=timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1],
        note=cfg.get("description") or "",
        sameness=_sameness(name, model),
    )


def _sameness(name: str, model: "nn.Module") -> str:
    """timm's model of the same name, if its weights have the same names and shapes; or golden records."""
    import timm
    import torch

    twin = name.removeprefix("va_")
    if twin != name and timm.is_model(twin):
        with torch.device("meta"):
            theirs = timm.create_model(twin)
        shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, theirs)]
        return f"timm's {twin}" if shapes[0] == shapes[1] else ""
    classes = next((classes for pattern, classes in REFERENCES.items() if fnmatchcase(name, pattern)), [])
    golden = Path(__file__).parents[1] / "tests" / "golden"
    records = [json.loads(path.read_text()) for path in sorted(golden.glob("*.json"))]
    records = [record for record in records if record["reference"]["class"] in classes]
    sources = {f"{record['reference']['repo']} at {record['reference']['commit'][:7]}" for record in records}
    names = ", ".join(record["name"] for record in records)
    return f"{classes[0]} of {', '.join(sorted(sources))}: golden records {names}" if records else ""


if __name__ == "__main__":
    print("[\n" + ",\n".join(json.dumps(asdict(describe(name))) for name in our_models()) + "\n]")
