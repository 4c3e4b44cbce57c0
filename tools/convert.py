"""`visionattn convert`: weights between the authors' key names, ours and timm's.

Forward is the family's `checkpoint_filter_fn`, which loading goes through too. Backward needs no second table: a
checkpoint of the authors, filled with numbers that are all different, goes through the filter, and where each number
comes out says where each of our weights has to go.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visionattn.errors import UserError, listed, nearest
from visionattn.files import new_file, refuse_existing
from visionattn.models.networks import create
from visionattn.models.weights import load_checkpoint, unwrapped
from visionattn.runs.checkpoints import load_trained

__all__ = ["NAMES", "convert", "to_authors", "to_ours", "to_timm"]

NAMES = ("ours", "authors", "timm")


def convert(source: Path, out: Path, model: str, to: str, like: Path | None = None) -> list[str]:
    """Write weights under other key names; returns the names that they have.

    Args:
        source: a checkpoint of the authors, of timm or of ours, or a run of a classifier.
        out: the file to write, .safetensors or what torch.save writes.
        model: our name of the network.
        to: ours, authors or timm.
        like: for authors, a checkpoint of theirs of this network, whatever its weights, which has the names.

    Raises:
        UserError: they are of another network, or the way back is not one to one.
    """
    if to not in NAMES:
        raise UserError(f"--to {to}: unknown key names{nearest(to, NAMES)}; there are {', '.join(NAMES)}")
    if (like is None) == (to == "authors"):
        raise UserError(
            "--like FILE, a checkpoint of the authors that has their names, goes with --to authors, and only so"
        )
    refuse_existing(out)
    network: nn.Module = create(model, {})
    state = to_ours(_weights(source, network), network)
    if like is not None:
        state = to_authors(state, network, _weights(like, network))
    elif to == "timm":
        state = to_timm(state, model)
    with new_file(out) as unfinished:
        if out.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in state.items()}, unfinished, {"format": "pt"})
        else:
            torch.save(state, unfinished)
    return list(state)


def _weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a file, or of the classifier of a run."""
    if path.is_dir() or (path.is_file() and "visionattn" in load_checkpoint(path)):
        return dict(load_trained(path).task.network.state_dict())
    return unwrapped(load_checkpoint(path), network.state_dict())


def to_ours(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors, of timm or of ours with the names of our network.

    Raises:
        UserError: they are of another one.
    """
    renamed = _filtered(state, network)
    own = network.state_dict()
    lacking, unknown = own.keys() - renamed.keys(), renamed.keys() - own.keys()
    if lacking or unknown:
        which = [f"without {listed(sorted(lacking), most=3)}"] if lacking else []
        which += [f"with {listed(sorted(unknown), most=3)}, which it has not"] if unknown else []
        raise UserError(f"the weights are not those of {type(network).__name__}: {'; '.join(which)}")
    return renamed


def _filtered(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    given = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if given is None:
        raise UserError(f"{type(network).__name__} is not a network of ours, whose authors' key names are known")
    try:
        return dict(given(dict(state), network))
    except (ValueError, KeyError, RuntimeError) as error:  # of weights of another network
        raise UserError(f"the weights are not those of {type(network).__name__}: {error}") from None


class _Place(NamedTuple):
    """An entry of the authors: where its numbers begin, and how it looks."""

    first: int
    entry: Tensor

    @property
    def end(self) -> int:
        return self.first + self.entry.numel()


def to_authors(state: dict[str, Tensor], network: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights with the names, shapes and order of a checkpoint of the authors.

    What they keep and we do not, such as tables that follow from sizes, is taken from `like`.

    Raises:
        UserError: the filter makes a weight of ours of several of theirs, or of none.
    """
    places, first = dict[str, _Place](), 0
    for key, entry in like.items():
        places[key] = _Place(first, entry)
        first += entry.numel()
    numbered = {k: torch.arange(p.first, p.end, dtype=torch.float64).view(p.entry.shape) for k, p in places.items()}
    seen = _filtered(numbered, network)
    values, filled = torch.zeros(first, dtype=torch.float64), torch.zeros(first, dtype=torch.bool)
    types: list[tuple[int, torch.dtype]] = []
    for key, number in seen.items():
        if key not in state or state[key].shape != number.shape:
            raise UserError(
                f"{key}: the weights and the authors' checkpoint are not of one network; pass another --like"
            )
        flat = number.flatten()
        whole = flat.long()
        if not torch.equal(whole.double(), flat) or filled[whole].any() or len(whole.unique()) < len(whole):
            raise UserError(
                f"{key} is computed from the authors' weights (resampled or added up), so that these cannot be told "
                "from it; there is no way back"
            )
        values[whole], filled[whole] = state[key].flatten().double(), True
        types += [(int(whole[0]), state[key].dtype)] if len(whole) else []
    left = state.keys() - seen.keys()
    if left:
        raise UserError(f"the authors' checkpoint has no place for {listed(sorted(left), most=5)}: pass another --like")
    return {key: _taken(place, values, filled, types) for key, place in places.items()}


def _taken(place: _Place, values: Tensor, filled: Tensor, types: list[tuple[int, torch.dtype]]) -> Tensor:
    own = filled[place.first : place.end]
    if not own.all():
        return place.entry
    inside = [dtype for number, dtype in types if place.first <= number < place.end]
    part = values[place.first : place.end].view(place.entry.shape)
    return part.to(inside[0] if inside else place.entry.dtype)


def to_timm(state: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """Our weights for timm's network of the same name, which takes them strictly.

    Raises:
        UserError: timm has none with these weights.
    """
    twin = model.removeprefix("va_")
    if twin == model or not timm.is_model(twin):
        raise UserError(f"timm has no network of its own like {model}")
    with torch.device("meta"):
        theirs = {key: value.shape for key, value in timm.create_model(twin).state_dict().items()}
    if theirs.keys() != state.keys():
        raise UserError(
            f"timm's {twin} has other weights than {model}: {listed(sorted(theirs.keys() ^ state.keys()), most=5)}"
        )
    return state
