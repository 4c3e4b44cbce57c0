"""Starting from weights that others have trained: a run of any task, its checkpoint, its backbone alone, or a file.

The backbone is the model that timm makes: a whole classifier, or what stands as `encoder.model` under a decoder, a
detector or an objective. Whatever prefix its keys have in a file, they are found by their ends. What is above it
(classifier, decoder, neck, head) is taken where all of it fits, and is new otherwise.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from visionattn.backbones.encoder_decoder import OverEncoder
from visionattn.errors import UserError, listed
from visionattn.files import new_file
from visionattn.models.weights import classifier_names, load_checkpoint, resampled, unwrapped
from visionattn.recipe.sections import Bands, Data, Model

__all__ = ["CLEAN", "About", "about", "adapt_bands", "save_backbone", "start_from", "with_bands"]

BACKBONE = "backbone.safetensors"  # in the folder of a run's checkpoints
ENCODER = "encoder.model."
CLEAN = "clean."  # before the statistics of batch norms on whole images, where others were trained on masked ones


class About(NamedTuple):
    """What a file of ours says of the weights in it.

    Attributes:
        task, model: that they were trained for, and the network's name.
        mean, std: of each channel.
        bands: of the files that the channels were, from 1; None: all, in their order.
        unit_range: images were scaled to 0..1 before mean and std.
        said: the file's own words, handed on to files that are made from it.
    """

    task: str
    model: str
    mean: list[float]
    std: list[float]
    bands: list[int] | None
    unit_range: bool | None
    said: dict[str, Any]


def _file(path: Path) -> Path:
    """The file of weights that a path means. Raises UserError where a folder is no run."""
    if not path.is_dir():
        return path
    files = [path / "checkpoints" / name for name in ("best.ckpt", BACKBONE)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"model.checkpoint: {path}: no checkpoints/best.ckpt in it; expected a run directory, a checkpoint, or a "
            "file of weights"
        )
    return found


def about(path: Path) -> About | None:
    """What the checkpoint at `path` says of itself; None where it is not ours. Raises UserError where it is none."""
    file = _file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint file")
    stat = file.stat()
    return _about(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _about(file: Path, written: int, size: int) -> About | None:
    if file.suffix == ".safetensors":
        load_checkpoint(file)  # which tells what is wrong with it
        with safe_open(file, "pt") as content:
            said = json.loads((content.metadata() or {}).get("visionattn", "null"))
    else:
        said = load_checkpoint(file).get("visionattn")
    if not isinstance(said, dict) or "recipe" not in said:
        return None
    recipe = yaml.safe_load(said["recipe"])
    data = recipe["data"]
    statistics = data.get("mean") or [], data.get("std") or []
    return About(recipe["task"], recipe["model"]["name"], *statistics, data.get("bands"), said.get("unit_range"), said)


def with_bands(data: Data, model: Model) -> Data:
    """The section that reads the bands which the checkpoint's network has seen, where it does not say which."""
    if model.checkpoint is None or model.bands is not None or getattr(data, "bands", ()) is not None:
        return data
    source = about(model.checkpoint)
    return data.model_copy(update={"bands": source.bands}) if source else data


def start_from(
    network: nn.Module, path: Path, name: str, arguments: dict[str, Any] | None = None, bands: Bands | None = None
) -> str:
    """Load weights into the network called `name`: its backbone, and what is above it where that fits.

    What depends on the size of images (position embeddings, tables of relative positions) is resampled as timm does it;
    first convolutions are changed to other bands where `bands` says so. Nothing else of the backbone may differ, but
    for what stands behind its last map.

    Args:
        path: a run directory, a checkpoint, or a file of weights, see the module.
        arguments: that the network was made with.
        bands: see the recipe's section.

    Returns:
        a line: what was taken, what is new, what is left out.

    Raises:
        UserError: not a checkpoint, or one of another network or other channels.
    """
    own = {key: value for key, value in network.state_dict().items() if not key.startswith(CLEAN)}
    prefix, source = _prefix(network), about(path)
    classifier = set(classifier_names(network))
    below, beside = _renamed(unwrapped(load_checkpoint(_file(path)), own), own, prefix)
    below, adapted = _with_bands(below, own, _first_convolutions(network, prefix), bands, path)
    saved = below | beside
    alike = all(_same_shape(key, saved, own) for key in saved.keys() & own.keys() - classifier)
    fitted = saved if alike else resampled(saved, network)
    body = {key for key in own if key.startswith(prefix)} - classifier
    if told := _differences(own, fitted, body, beside, lambda: _behind(network, prefix, name, arguments or {})):
        other = f" but of {source.model}" if source and source.model != name else ""
        raise UserError(f"{path}: not a checkpoint of {name}{other}: {told}")

    taken, new = body & fitted.keys(), _parts(body - fitted.keys(), prefix)
    above = [{key for key in own if key.split(".")[0] == part} for part in _parts(own.keys() - body - classifier, "")]
    for keys in [*(keys - classifier for keys in above), classifier]:
        if keys and all(key in fitted and _same_shape(key, fitted, own) for key in keys):
            taken |= keys
        elif keys:
            new += _heads(own, keys) if keys == classifier else _parts(keys, "")
    left = _parts(fitted.keys() - taken - classifier, prefix) + _heads(fitted, classifier - taken)
    network.load_state_dict({key: fitted[key] for key in taken}, strict=False)
    sized = [key for key in taken & saved.keys() if saved[key].shape != fitted[key].shape]
    texts = [
        f"{path}: {len(taken)} tensors of {source.model if source else name} taken",
        f"resampled for the size of images: {listed(sorted(sized), most=3)}" if sized else "",
        adapted,
        f"left out: {listed(left, most=8)}" if left else "",
        f"new: {listed(new, most=8)}" if new else "nothing is new",
    ]
    return "; ".join(filter(None, texts))


def adapt_bands(network: nn.Module, published: nn.Module, name: str, bands: Bands) -> str:
    """Give a network of published weights their first convolutions over the bands of the images.

    Args:
        published: the model with as many channels as its weights have seen.
        bands: see the recipe's section.

    Returns:
        a line: what each band got.

    Raises:
        UserError: as many names as there are no channels.
    """
    prefix, own, whose = _prefix(network), network.state_dict(), f"published weights of {name}"
    keys = _first_convolutions(network, prefix)
    state = {prefix + key: value for key, value in published.state_dict().items()}
    changed, told = _with_bands({key: state[key] for key in keys}, own, keys, bands, whose)
    network.load_state_dict(changed, strict=False)
    return f"{whose}; {told}"


def _prefix(network: nn.Module) -> str:
    """Of the backbone's keys in a network."""
    return ENCODER if isinstance(network, OverEncoder) else ""


def _backbone(network: nn.Module) -> Any:
    return network.get_submodule(_prefix(network).rstrip("."))


def _same_shape(key: str, some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some[key].shape == others[key].shape


def _parts(keys: Iterable[str], prefix: str) -> list[str]:
    """What the keys belong to, by its first name."""
    return sorted({key.removeprefix(prefix).split(".")[0] for key in keys})


def _heads(state: Mapping[str, Tensor], classifier: set[str]) -> list[str]:
    return [f"head of {len(state[key])} classes" for key in sorted(classifier & state.keys())[:1]]


def _renamed(
    state: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's weights under the keys that they have in the network, and the others in the file.

    Their prefix in the file is the one under which most keys of the network's backbone are found.
    """
    known, votes = {key.removeprefix(prefix) for key in own if key.startswith(prefix)}, Counter[str]()
    for key in state:
        parts = key.split(".")
        votes.update(".".join([*parts[:n], ""]).lstrip(".") for n in range(len(parts)) if ".".join(parts[n:]) in known)
    found = max(votes, key=lambda before: (votes[before], -len(before)), default="")
    outer = found.removesuffix(ENCODER)
    clean = {key: outer + key.removeprefix(outer + CLEAN).replace("/", ".") for key in state if CLEAN in key}
    state = {k: v for k, v in state.items() if k not in clean} | {name: state[key] for key, name in clean.items()}
    below = {prefix + k.removeprefix(found): v for k, v in state.items() if k.startswith(found)}
    return below, {k.removeprefix(outer): v for k, v in state.items() if not k.startswith(found)}


def _differences(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    body: set[str],
    beside: Mapping[str, Tensor],
    behind: Callable[[], tuple[set[str], set[str]]],
) -> str:
    """In which keys of the backbone `body` the weights are not the network's; "" where they are."""
    missing, unknown = body - state.keys(), state.keys() - beside.keys() - own.keys()
    if missing or unknown:
        whole, last = behind()
        missing, unknown = missing - last, unknown - whole
    differ = [key for key in sorted(body & state.keys()) if not _same_shape(key, state, own)]
    shapes = [f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in differ]
    titles = {"missing": sorted(missing), "unknown": sorted(unknown), "other shape": shapes}
    return "; ".join(f"{title}: {listed(names, most=3)}" for title, names in titles.items() if names)


def _behind(network: nn.Module, prefix: str, name: str, arguments: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The keys that the whole backbone has, and those of what stands behind its last map."""
    architecture = _backbone(network).pretrained_cfg.get("architecture") or name
    with torch.device("meta"):
        whole: Any = timm.create_model(architecture, **(arguments if architecture == name else {}))
    keys, last = set(whole.state_dict()), set(classifier_names(whole))
    if hasattr(whole, "prune_intermediate_layers"):
        whole.prune_intermediate_layers(list(range(len(whole.feature_info))), prune_norm=True, prune_head=True)
        last = keys - whole.state_dict().keys()
    return {prefix + key for key in keys}, {prefix + key for key in last}


def _first_convolutions(network: nn.Module, prefix: str) -> list[str]:
    """Keys of the kernels that see the image."""
    names = _backbone(network).pretrained_cfg.get("first_conv") or ()
    return [f"{prefix}{name}.weight" for name in ([names] if isinstance(names, str) else names)]


def _with_bands(
    state: dict[str, Tensor], own: Mapping[str, Tensor], keys: list[str], bands: Bands | None, path: Path | str
) -> tuple[dict[str, Tensor], str]:
    """The weights with first convolutions over the network's bands, and what each of these got."""
    keys = [key for key in keys if key in state and key in own]
    if not keys:
        return state, ""
    before, now = (weights[keys[0]].shape[1] for weights in (state, own))
    if bands is None and before != now:
        example = "model.bands={source: [red, green, blue], target: [blue, green, red, nir]}"
        raise UserError(
            f"{path}: its network takes {before} channels, but the images have {now} ({keys[0]}): name the bands of "
            f"both by {example}, or have all of them repeated or averaged by model.bands={{}}"
        )
    if bands is None:
        return state, ""
    source = bands.source or [str(k) for k in range(1, before + 1)]
    target = bands.target or ([f"new {k}" for k in range(1, now + 1)] if bands.source or before != now else source)
    for names, key, count in ((source, "source", before), (target, "target", now)):
        if len(names) != count:
            whose = "the weights take" if key == "source" else "the images have"
            raise UserError(f"model.bands.{key} has {len(names)} names, but {whose} {count} channels ({path})")
    places = [source.index(name) if name in source else None for name in target]
    changed = {key: _adapted(state[key], places) for key in keys}
    others = [name for name, place in zip(target, places, strict=True) if place is None]
    texts = [f"{name} from {name}" for name, place in zip(target, places, strict=True) if place is not None]
    mean = source[0] if before == 1 else f"the mean of {listed(source)}"
    texts += [f"{listed(others)} from {mean}"] if others else []
    return state | changed, f"bands: {', '.join(texts)}"


def _adapted(kernel: Tensor, places: list[int | None]) -> Tensor:
    """A kernel (out, bands, h, w) over other bands, each one of the old ones or their mean.

    It is scaled so that the response to bands that are alike keeps its size.
    """
    mean = kernel.float().mean(1)
    made = torch.stack([mean if place is None else kernel[:, place].float() for place in places], 1)
    before, now = (weights.float().sum(1).norm() for weights in (kernel, made))
    factor = before / now if min(before, now) > 0 else torch.tensor(kernel.shape[1] / len(places))
    return (made * factor).to(kernel.dtype)


def save_backbone(network: nn.Module, checkpoint: Path) -> None:
    """Write the backbone of a network's checkpoint beside it, with what the checkpoint says of itself.

    Its keys are those that timm's model has, without a classifier.
    """
    prefix, source = _prefix(network), about(checkpoint)
    heads = {key for key in classifier_names(network) if key.startswith(prefix)}
    kept = {
        key.removeprefix(prefix): value.contiguous()
        for key, value in network.state_dict().items()
        if key.startswith(prefix) and key not in heads
    }
    for key, value in network.state_dict().items():
        if key.startswith(CLEAN):
            kept[key.removeprefix(CLEAN).replace("/", ".").removeprefix(prefix)] = value
    said = {"visionattn": json.dumps(source.said if source else None), "format": "pt"}
    with new_file(checkpoint.with_name(BACKBONE), replace=True) as unfinished:
        unfinished.write_bytes(save(kept, said))
