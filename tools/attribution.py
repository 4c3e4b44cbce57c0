"""Maps of what a number of a network's output depends on: by gradients, by hiding, by attention.

Each method takes a `Question` and gives an `Answer`, a map of any size over the image. Sources: Grad-CAM, Selvaraju et
al. 2017, arXiv 1610.02391; LayerCAM, Jiang et al., IEEE TIP 2021; integrated gradients, Sundararajan et al. 2017, arXiv
1703.01365; occlusion, Zeiler and Fergus 2014, arXiv 1311.2901; rollout and relevance, see `visionattn.tools.explain`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UserError, listed, nearest
from visionattn.kernels import record_attention
from visionattn.kernels._record import Attention, attention_in_backward
from visionattn.tools.explain import Row, spread

__all__ = ["METHODS", "Answer", "Question", "head_importance", "integrated_gradients", "layers_of"]

COMPLETE = 0.01  # share of the change of the output that integrated gradients may miss
STEPS = 16, 256  # of integrated gradients: first, and at most
PIXELS = 2**18  # of images at a time
NOTHING = "no attention was recorded in the network"
ELSE = "take layercam, gradcam, ig or occlusion"


@dataclass(frozen=True)
class Question:
    """What is explained.

    Attributes:
        network: in evaluation mode.
        image: (C, h, w), normalised, so that 0 is the mean.
        logit: images (B, C, h, w) -> (B,), of `network`, with gradient.
        region: (h, w) bool that the number is of, or None.
        layer: of CAM, one of `layers_of`, of attention a name of the record; None: chosen.
        query: (row, column) of a pixel of `image` whose attention is asked for; None: the middle of the region.
        head: of attention; None: their mean.
    """

    network: nn.Module
    image: Tensor
    logit: Callable[[Tensor], Tensor]
    region: Tensor | None = None
    layer: str | None = None
    query: tuple[int, int] | None = None
    head: int | None = None


class Answer(NamedTuple):
    """A map over the image.

    Attributes:
        map: (h, w) of any size.
        layer: that it is of, "" of the image itself.
        outside: share of attention that left the picture; None where none is followed.
        note: what else there is to know of it.
    """

    map: Tensor
    layer: str = ""
    outside: float | None = None
    note: str = ""


def gradient(question: Question) -> Answer:
    """Gradient times image, added up over the channels: signed."""
    image = question.image[None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(question.logit(image).sum(), image)
    return Answer((slope * image.detach())[0].sum(0))


def integrated_gradients(question: Question) -> Answer:
    """Gradients along the way from the mean image, added up over the channels: signed.

    Steps are doubled until what the map adds up to misses the change of the output by less than a hundredth.
    """
    image, steps = question.image, STEPS[0]
    with torch.no_grad():
        ends = question.logit(torch.stack([image, torch.zeros_like(image)]))
        change = (ends[0] - ends[1]).item()
    slope = (_slopes(question, [0.0, 1.0]) / 2 + _slopes(question, [k / steps for k in range(1, steps)])) / steps
    while True:
        found = (slope * image).sum(0)
        missed = abs(found.sum().item() - change) / max(abs(change), 1e-12)
        if missed < COMPLETE or steps >= STEPS[1]:
            more = "" if missed < COMPLETE else ", more than 1 %"
            return Answer(found, note=f"{steps} steps, {missed:.1%} of the change of the output is missed{more}")
        slope = (slope + _slopes(question, [(k + 0.5) / steps for k in range(steps)]) / steps) / 2
        steps *= 2


def _slopes(question: Question, shares: Sequence[float]) -> Tensor:
    """The sum of the gradients at these shares of the image."""
    image, total = question.image, torch.zeros_like(question.image)
    for part in torch.tensor(shares, dtype=image.dtype, device=image.device).split(_batch(image)):
        images = (part[:, None, None, None] * image).requires_grad_()
        (slopes,) = torch.autograd.grad(question.logit(images).sum(), images)
        total += slopes.sum(0)
    return total


def _batch(image: Tensor) -> int:
    """Images at a time."""
    return min(64, max(1, PIXELS // (image.shape[1] * image.shape[2])))


def occlusion(question: Question) -> Answer:
    """How much the output falls where a square is replaced by the mean: signed, averaged over squares."""
    image = question.image
    height, width = image.shape[1:]
    side = max(2, min(height, width) // 6)
    starts = [[*range(0, length - side, max(1, side // 2)), length - side] for length in (height, width)]
    places = [(top, left) for top in starts[0] for left in starts[1]]
    total, count = torch.zeros(2, height, width, device=image.device, dtype=image.dtype)
    with torch.no_grad():
        before = question.logit(image[None])[0]
        batch = _batch(image)
        for first in range(0, len(places), batch):
            part = places[first : first + batch]
            hidden = image.repeat(len(part), 1, 1, 1)
            for one, (top, left) in zip(hidden, part, strict=True):
                one[:, top : top + side, left : left + side] = 0
            for fall, (top, left) in zip(before - question.logit(hidden), part, strict=True):
                total[top : top + side, left : left + side] += fall
                count[top : top + side, left : left + side] += 1
    return Answer(total / count, note=f"squares of {side} pixels")


def layers_of(network: nn.Module) -> dict[str, dict[str, Any]]:
    """By name the layers that give a map: of a classifier the stages that it lists, of others those of their encoder.

    Values have the channels (`num_chs`), stride (`reduction`) and, where it matters, `format` of the map.
    """
    encoder = getattr(network, "encoder", None)
    info = getattr(network, "feature_info", None)
    prefix = ""
    if info is None and encoder is not None:
        info, prefix = encoder.feature_info, "encoder.model."
    if info is None:
        return {}
    entries = info if isinstance(info, list) else info.get_dicts()
    names = {name for name, _ in network.named_modules()}
    order = getattr(getattr(encoder, "model", network), "map_format", "NCHW")
    found = {prefix + entry["module"]: {**entry, "format": order} for entry in entries}
    return {name: entry for name, entry in found.items() if name in names}


def _cam(question: Question, weigh: Callable[[Tensor, Tensor], Tensor], finest: bool) -> Answer:
    """weigh: map and gradient (B, C, h, w) -> (B, h, w); of the finest map, or the last one, that has a gradient."""
    layers = layers_of(question.network)
    if question.layer is not None and question.layer not in layers:
        near = nearest(question.layer, layers)
        raise UserError(f"layer {question.layer} has no map, expected one of {listed(list(layers))}{near}")
    if not layers:
        raise UserError("the network lists no layers with maps (feature_info): take ig, occlusion or gradient")
    maps: dict[str, Tensor] = {}
    with _watched(question.network, layers, maps):
        image = question.image[None].clone().requires_grad_()
        output = question.logit(image).sum()
    names = [question.layer] if question.layer else list(maps)
    if finest and not question.layer:
        names.sort(key=lambda name: -layers[name]["reduction"])  # stable: of one stride the last
    size = question.image.shape[1:]
    slopes = torch.autograd.grad(output, [maps[name] for name in names], allow_unused=True)
    for name, slope in reversed(list(zip(names, slopes, strict=True))):
        if slope is None:
            continue
        values, changes = (_as_map(x.detach(), layers[name], size) for x in (maps[name], slope))
        if changes.any() or len(names) == 1:
            return Answer(weigh(values, changes)[0].clamp(min=0), name)
    raise UserError("the output depends on none of the maps of the network's layers")


@contextmanager
def _watched(network: nn.Module, layers: dict[str, Any], maps: dict[str, Tensor]) -> Iterator[None]:
    """What these layers give is put into `maps`; of checkpointed ones nobody would see it."""

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            maps[name] = output[0] if isinstance(output, tuple | list) else output

        return hook

    with ExitStack() as undo:
        modules: Iterable[Any] = network.modules()
        for module in modules:
            if getattr(module, "grad_checkpointing", False):
                module.grad_checkpointing = False
                undo.callback(setattr, module, "grad_checkpointing", True)
        for name in layers:
            undo.callback(network.get_submodule(name).register_forward_hook(see(name)).remove)
        yield


def _as_map(x: Tensor, entry: dict[str, Any], size: Sequence[int]) -> Tensor:
    """(B, C, h, w) of maps in either order of axes, and of tokens behind others."""
    channels, stride = entry["num_chs"], entry["reduction"]
    if x.ndim == 3:
        height, width = (-(-side // stride) for side in size)
        return x[:, x.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
    first = x.shape[1] == channels and (x.shape[3] != channels or entry["format"] == "NCHW")
    return x if first else x.permute(0, 3, 1, 2)


def gradcam(question: Question) -> Answer:
    """Channels of a map weighed by their mean gradient; by default of the last stage."""
    return _cam(question, lambda x, slope: (x * slope.mean((2, 3), keepdim=True)).sum(1), finest=False)


def layercam(question: Question) -> Answer:
    """A map times its positive gradient; by default of the finest stage."""
    return _cam(question, lambda x, slope: (x * slope.clamp(min=0)).sum(1), finest=True)


def rollout(question: Question) -> Answer:
    """Attention from the last layer to the first, blind to the class."""
    found = _traced(question, relevant=False, of=lambda weights, change: weights)
    return found._replace(note=f"blind to the class; {found.note}")


def relevance(question: Question) -> Answer:
    """The same, weighed by the positive gradient of the logit."""
    return _traced(question, relevant=True, of=lambda weights, change: (weights * change).clamp(min=0))


def _traced(question: Question, relevant: bool, of: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    modules = dict(question.network.named_modules())
    row: Row | None = None
    start: tuple[Tensor, Tensor]
    kinds: set[str] = set()

    def take(name: str, part: Attention, last: bool) -> None:
        nonlocal row, start
        kinds.add(part.kind)
        if part.kind == "channel" or hasattr(modules[name], "proj_w"):  # of CaiT, whose heads are mixed
            return
        if row is None:
            start = _start(question, part)
            row = Row(*start, relevant)
        row.pass_on(part)
        if last:
            row.leave()

    image = question.image[None].clone().requires_grad_()
    try:
        with _frozen(question.network), attention_in_backward(question.network, of, take):
            torch.autograd.grad(question.logit(image).sum(), image)
    except ValueError as error:
        raise UserError(f"{error}: {ELSE}") from None
    if row is None:
        why = "all attention of the network is over channels, which have no place" if kinds else NOTHING
        raise UserError(f"{why}: {ELSE}")
    traced = row.traced
    found = traced.map
    if relevant:  # what attention has added, without what was asked about
        found = (found - spread(start[0], found.shape[1:])).clamp(min=0)
    return Answer(found[0], outside=traced.outside.item(), note="passes over convolutions and MLPs")


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Parameters want no gradient, for which layers would keep what they are given."""
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _start(question: Question, last: Attention) -> tuple[Tensor, Tensor]:
    """What is asked about of the last layer: the class token, or the places of the region, or all."""
    like = last.weights
    by_token = last.kind == "class" or (last.prefix > 0 and getattr(question.network, "global_pool", "") == "token")
    count = like.shape[2] if last.kind == "class" else last.prefix
    tokens = like.new_zeros(1, count)
    places = like.new_zeros(1, *(last.keys if last.kind == "class" else last.queries))
    if by_token:
        tokens[0, 0] = 1
    elif question.region is None:
        places += 1 / places.numel()
    else:
        region = F.adaptive_avg_pool2d(question.region[None].to(like), (last.queries[0], last.queries[1]))
        places = region / region.sum().clamp(min=1e-12)
    return places, tokens


def attention(question: Question) -> Answer:
    """The true weights of one query, of the layer asked for or the last one whose queries are places."""
    calls = _recorded(question, "space")
    row, column = question.query or _middle(question)
    found = None
    for name, call in reversed(calls):
        place = _place(call, row, column, question.image.shape[1:])
        rows = torch.arange(call.weights.shape[2]) if call.places is None else call.places.cpu()
        if len(chosen := (rows == place).nonzero()[:, 0]):
            found = name, call, chosen
            break
    assert found is not None  # the calls of a layer have all places
    name, call, chosen = found
    return _of_rows(question, name, call, chosen, f"of pixel {column},{row}")


def class_attention(question: Question) -> Answer:
    """What the class token attends to, in the layer asked for or the last one that has it."""
    calls = [(n, c) for n, c in _recorded(question, "class", "space") if c.kind == "class" or c.prefix]
    if not calls:
        raise UserError(f"no class token attends to anything in this network: {ELSE}")
    name, call = calls[-1]
    return _of_rows(question, name, call, torch.tensor([0]), "of the class token")


def _recorded(question: Question, *kinds: str) -> list[tuple[str, Attention]]:
    with record_attention(question.network) as record, torch.no_grad():
        question.logit(question.image[None])
    found = [(name, call) for name, calls in record.items() for call in calls if call.kind in kinds and call.keys]
    if not found:
        channels = any(call.kind == "channel" for calls in record.values() for call in calls)
        why = "the network's attention is over channels, or of places that are not known" if channels else NOTHING
        raise UserError(f"{why}: {ELSE}")
    if question.layer is None:
        return found
    names = list(dict.fromkeys(name for name, _ in found))
    if question.layer not in names:
        near = nearest(question.layer, names)
        raise UserError(f"layer {question.layer} has no such attention, expected one of {listed(names)}{near}")
    return [(name, call) for name, call in found if name == question.layer]


def _middle(question: Question) -> tuple[int, int]:
    """(row, column) of the middle of the region, or of the image."""
    region = question.region
    if region is None:
        return question.image.shape[1] // 2, question.image.shape[2] // 2
    row, column = region.nonzero().float().mean(0).round().int().tolist()
    return row, column


def _place(call: Attention, row: int, column: int, size: Sequence[int]) -> int:
    (height, width) = call.queries
    return call.prefix + row * height // size[0] * width + column * width // size[1]


def _of_rows(question: Question, name: str, call: Attention, rows: Tensor, what: str) -> Answer:
    """Where the weights of some rows lie, added up."""
    weights = call.weights[0, :, rows].sum(1)
    if question.head is not None and question.head >= len(weights):
        raise UserError(f"head {question.head}: layer {name} has heads 0 to {len(weights) - 1}")
    weights = weights.mean(0) if question.head is None else weights[question.head]
    keys = [call.keys, call.pooled] if call.pooled else [call.keys]
    found = weights.new_zeros(1 + call.prefix + sum(math.prod(size) for size in keys))
    if call.indices is None:
        found[1:] = weights
    else:
        for row in rows:
            own = call.weights[0, :, row]
            own = own.mean(0) if question.head is None else own[question.head]
            found.index_add_(0, call.indices[0, row] + 1, own)
    outside, places = found[0] / found.sum(), found[1 + call.prefix :]
    total = places[: math.prod(call.keys)].unflatten(0, call.keys)
    if call.pooled:
        total = total + spread(places[math.prod(call.keys) :].unflatten(0, call.pooled)[None], call.keys)[0]
    of = "the mean of the heads" if question.head is None else f"head {question.head}"
    return Answer(total, name, outside.item(), f"{what}, {of}")


def head_importance(question: Question) -> list[tuple[str, int, float]]:
    """Layer, head and how much the logit depends on it: |sum of weights times their gradients| (Michel et al. 2019,
    arXiv 1905.10650), of all attention that the network has.

    Raises:
        UserError: there is none.
    """
    image = question.image[None].clone().requires_grad_()
    with record_attention(question.network) as record:
        torch.autograd.grad(question.logit(image).sum(), image, retain_graph=False)
    if not record:
        raise UserError(f"{NOTHING}, so no heads")
    rows: list[tuple[str, int, float]] = []
    for name, calls in record.items():
        total = torch.zeros(calls[0].weights.shape[1])
        for call in calls:
            if call.weights.grad is not None:
                total += (call.weights.detach() * call.weights.grad).sum((0, 2, 3)).cpu()
        rows += [(name, head, abs(share)) for head, share in enumerate(total.tolist())]
    return rows


METHODS: dict[str, Callable[[Question], Answer]] = {
    "layercam": layercam,
    "ig": integrated_gradients,
    "gradcam": gradcam,
    "gradient": gradient,
    "occlusion": occlusion,
    "rollout": rollout,
    "relevance": relevance,
    "attention": attention,
    "class-attention": class_attention,
}
