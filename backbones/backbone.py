"""What classifiers here share: how they are made, and timm's methods, around one loop over the stages of a family."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, get_args

import torch
from timm.layers import (
    ClassifierHead,
    NormMlpClassifierHead,
    SelectAdaptivePool2d,
    create_classifier,
    get_device_dtype,
)
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionattn.backbones.layers import GGeM, check_image_size, check_pool, refuse_script

__all__ = [
    "LAYOUTS_KEPT",
    "Backbone",
    "HeadClassifier",
    "MapClassifier",
    "TokenClassifier",
    "create",
    "factory",
    "make_classifier",
]

# Options of torch.compile. In networks with convolutions Inductor takes the second of four axes for channels, and so
# transposes maps (B, H, W, C) at every layer.
LAYOUTS_KEPT = {"layout_optimization": False}

torch.fx.wrap("check_image_size")


class Backbone(nn.Module):
    """A network of stages that end in a map each.

    A family derives from one of the classes below, by its classifier, and writes:

    - `__init__`: sets num_classes, in_chans, num_features and head_hidden_size (channels of the last map), feature_info
      (num_chs, reduction and module of each stage), its layers, and what the class below asks for;
    - `forward_stages`: runs the network;
    - `prune_stages`: removes the end of it;
    - `intermediate`, if it has a final norm;
    - timm's `no_weight_decay` and `group_matcher`;
    - those of the values below that are others for it.

    fx: a layer that branches on sizes is a `register_notrace_module`, and a function that does, called from
    `forward_stages` or from a layer that is traced, is named to `torch.fx.wrap` in the file that calls it.

    torch.compile, torch.export and torch.jit.trace take all networks; the deprecated torch.jit.script is refused. On a
    CPU what `compile()` makes takes 0.88 to 1.0 of the time of what torch.compile makes, see LAYOUTS_KEPT.
    """

    map_format = "NHWC"  # of the maps that forward_stages yields, or NCHW
    output_formats = ("NCHW", "NHWC")  # of the maps that forward_intermediates can return; NLC: (B, H * W, C)
    min_size = 32  # pixels on a side of an image
    grad_checkpointing = False
    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    pretrained_cfg: dict[str, Any]  # by timm

    __prepare_scriptable__ = refuse_script

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As that of `nn.Module`; by Inductor, without a mode, which excludes options, with LAYOUTS_KEPT too."""
        if kwargs.get("backend", "inductor") == "inductor" and kwargs.get("mode") is None:
            kwargs["options"] = LAYOUTS_KEPT | (kwargs.get("options") or {})
        super().compile(*args, **kwargs)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the map of each stage in turn and, last, what `forward_features` returns.

        Images are (B, in_chans, H, W), of a size that was checked. Where self.grad_checkpointing, blocks are run by
        timm's `checkpoint` or `checkpoint_seq`. What follows a `yield` is run only if more is asked for.
        """
        raise NotImplementedError

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        """Remove what follows the first `stages` stages: of these no more than asked; num_features is set already.

        norm, head: remove the final norm, and the classifier by reset_classifier(0, ""), even if they still fit.
        """
        raise NotImplementedError

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """The map that `forward_intermediates` returns for one that a stage yielded; norm: of no effect by default."""
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returns -> logits, or what they are computed from."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages, and the final features unless intermediates_only.

        Args:
            indices: stages whose maps to return; the last n for an int, all for None.
            norm: apply the final norm, if there is one, to the maps that it is for (see `intermediate`).
            stop_early: do not run what follows the last index; the final features are then the map there.
            output_fmt: of the maps returned for the stages: `NCHW`, or `NHWC` or, of tokens, `NLC`.
        """
        if output_fmt not in self.output_formats:
            raise ValueError(f"output_fmt={output_fmt!r}: expected {' or '.join(map(repr, self.output_formats))}")
        stages = len(self.feature_info)
        take, last = feature_take_indices(stages, indices)
        check_image_size(x, self.min_size)
        outputs = self.forward_stages(x)
        maps = []
        for i, x in enumerate(islice(outputs, last + 1 if stop_early else stages)):
            if i in take:
                maps.append(self._as(output_fmt, self.intermediate(x, i, norm)))
        if intermediates_only:
            return maps
        return (self._as("NCHW", x) if stop_early and last + 1 < stages else next(outputs)), maps

    def _as(self, output_fmt: str, x: Tensor) -> Tensor:
        if output_fmt == self.map_format:
            return x
        if output_fmt == "NLC":
            return x.flatten(1, 2)
        return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x.permute(0, 2, 3, 1)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates(indices=...)` does not need."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.feature_info = self.feature_info[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.prune_stages(last + 1, prune_norm, prune_head)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_size(x, self.min_size)
        for features in self.forward_stages(x):  # noqa: B007 - one map at a time stays in memory
            pass
        return features

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MapClassifier(Backbone):
    """Features are a map (B, C, H, W). Set global_pool, head_drop and head, by `make_classifier`."""

    global_pool: SelectAdaptivePool2d | GGeM
    head_drop: nn.Module
    head: nn.Module

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for num_classes, or by nothing for 0; global_pool "" leaves maps."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, _, self.head = make_classifier(self.num_features, num_classes, pool, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)


class HeadClassifier(Backbone):
    """Features are a map (B, C, H, W). Set head by `set_head`."""

    head: ClassifierHead | NormMlpClassifierHead

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for num_classes, or by nothing for 0; global_pool "" leaves maps.

        A norm after pooling stays, as in timm.
        """
        self.num_classes, options = num_classes, get_device_dtype(self)
        self.head.reset(num_classes, "avg" if global_pool == "ggem" else global_pool, **options)
        if global_pool == "ggem":
            self._pool_by_ggem()
            self.head.global_pool.to(**options)
        self.head.train(self.training)

    def set_head(self, make: Callable[..., ClassifierHead | NormMlpClassifierHead], global_pool: str) -> None:
        """The head is one of timm's modules, made with this pool_type, or with GGeM in place of it."""
        self.head = make(pool_type="avg" if global_pool == "ggem" else global_pool)
        if global_pool == "ggem":
            self._pool_by_ggem()

    def _pool_by_ggem(self) -> None:
        flatten = isinstance(self.head, ClassifierHead)  # the other one has a norm after it
        self.head.global_pool = GGeM(self.num_features, flatten=flatten)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)


class TokenClassifier(Backbone):
    """Features are tokens (B, 1 + H * W, C), the class token first.

    Set cls_token (None once pruned), head_drop and head; call `set_pool`.
    """

    cls_token: nn.Parameter | None
    global_pool: str
    ggem: GGeM | None
    head_drop: nn.Module
    head: nn.Module

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for num_classes, or by nothing for 0; global_pool "" leaves tokens."""
        self.num_classes = num_classes
        options = get_device_dtype(self)
        if global_pool is not None:
            self.set_pool(global_pool, self.cls_token is not None)
            self.ggem = self.ggem and self.ggem.to(**options)
        self.head = nn.Linear(self.num_features, num_classes, **options) if num_classes else nn.Identity()
        self.head.train(self.training)

    def set_pool(self, global_pool: str, class_token: bool = True) -> None:
        """Pool tokens like that (see `check_pool`); of a network that has its num_features."""
        self.global_pool = check_pool(global_pool, class_token)
        self.ggem = GGeM(self.num_features) if global_pool == "ggem" else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        first = 0 if self.cls_token is None else 1
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.ggem is not None:
            x = self.ggem(x[:, first:])
        elif self.global_pool == "avg":
            x = x[:, first:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


def make_classifier(
    num_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, **options: Any
) -> tuple[Any, nn.Module, nn.Module]:
    """Pooling, dropout and classifier of maps, of timm's `create_classifier`, whose pool_type may also be "ggem"."""
    timms = "avg" if pool_type == "ggem" else pool_type
    pool, dropout, head = create_classifier(num_features, num_classes, timms, drop_rate=drop_rate, **options)
    return GGeM(num_features).to(**options) if pool_type == "ggem" else pool, dropout, head


def create(
    network: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable,
    default_indices: int | tuple[int, ...] = (0, 1, 2, 3),
    unpublished: str = "its weights were never published",
    **kwargs: Any,
) -> nn.Module:
    """What `timm.create_model(variant)` returns: `network` of these arguments, which may name a device and a dtype.

    Args:
        network: class of a family.
        variant: registered name.
        pretrained: load weights, through checkpoint_filter_fn.
        default_indices: `out_indices` of `features_only=True`, unless the arguments have others.
        unpublished: why weights cannot be fetched, where no address of them is known.

    Raises RuntimeError for `pretrained` weights that cannot be fetched, ValueError for an argument that `network` does
    not have and for a dtype that is none of weights.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"pretrained=True: {variant}: {unpublished}; add pretrained_cfg_overlay=dict(file=PATH) for a file on your"
            " disk, or use pretrained=False"
        )
    return build_model_with_cfg(
        factory(network, variant),
        variant,
        pretrained,
        pretrained_filter_fn=partial(_with_pooling, checkpoint_filter_fn),
        feature_cfg={"out_indices": kwargs.pop("out_indices", default_indices), "feature_cls": "getter"},
        **kwargs,
    )


def _with_pooling(
    checkpoint_filter_fn: Callable[..., dict[str, Tensor]], state_dict: dict[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """Filtered weights, with the powers of a pooling that they do not have as the model has them."""
    powers = {f"{name}.p": module.p.detach() for name, module in model.named_modules() if isinstance(module, GGeM)}
    return powers | checkpoint_filter_fn(state_dict, model)


def factory(network: Callable[..., nn.Module], variant: str) -> Callable[..., nn.Module]:
    """`network`, which then takes a device and a dtype too, and is made there; others than its arguments are refused.

    timm calls it without the arguments that are for timm itself. variant: what refusals call it.
    """

    def make(device: torch.device | str | None = None, dtype: torch.dtype | None = None, **kwargs: Any) -> nn.Module:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype!r}: expected a floating torch.dtype, such as torch.float16")
        names = _arguments(network)
        for name in sorted(kwargs.keys() - names):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(names))}"
            raise ValueError(f"{variant} has no argument {name}={kwargs[name]!r}; {hint}")
        with nullcontext() if device is None else torch.device(device):
            return network(**kwargs).to(dtype=dtype)

    return make


def _arguments(network: Callable[..., nn.Module]) -> set[str]:
    """By its signature; of `**options: Unpack[Options]` those of Options."""
    names = set()
    for name, parameter in inspect.signature(network).parameters.items():
        options = get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ()
        names |= set(options[0].__annotations__) if options else {name}
    return names
