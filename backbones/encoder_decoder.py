"""An encoder, a decoder and heads as one network for segmentation, whichever they are."""

import re
from typing import Any

import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionattn.backbones.layers import refuse_script

__all__ = ["EncoderDecoder", "OverEncoder"]


class OverEncoder(nn.Module):
    """A network whose `encoder`, one of timm's with `features_only`, says how all of it is trained."""

    encoder: Any  # what timm gives it is not declared there

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the encoder; what is above it may hold batch norms, whose statistics would count each batch twice."""
        self.encoder.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"encoder.model.{name}" for name in getattr(self.encoder.model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's groups, or one where it has none; all else above them."""
        if not hasattr(self.encoder.model, "group_matcher"):
            return {"stem": r"^encoder"}
        groups: dict[str, Any] = {}
        for name, spec in self.encoder.model.group_matcher(coarse).items():
            patterns = [(spec, None)] if isinstance(spec, str) else spec or []
            groups[name] = [(_behind_encoder(pattern), suffix) for pattern, suffix in patterns]
        return groups


class EncoderDecoder(OverEncoder):
    """Images (B, in_chans, H, W) of any size from 32 x 32 -> logits (B, num_classes, H, W).

    Args:
        encoder: images -> list of maps, fine to coarse; of timm, by `features_only=True, feature_cls="getter"`.
        decoder: those maps -> list of decoded maps, fine to coarse. Its attribute `out_channels` lists their channels.
        num_classes: of the heads, a 1x1 convolution for each decoded map. The finest one is the prediction, and its
            input is what `num_features` counts.
        in_chans: of the images.
        neck: between encoder and decoder, maps -> maps.
        multiple: images are continued at the bottom and on the right by their last row and column to a multiple of
            this many pixels, and the logits are cut back.
        drop_rate: of whole channels, before the heads.

    torch.compile, torch.export and torch.jit.trace take it, if encoder and decoder do; the deprecated torch.jit.script
    is refused.
    """

    decoder: Any  # what it gives is not declared

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_classes: int,
        in_chans: int = 3,
        neck: nn.Module | None = None,
        multiple: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.multiple = in_chans, multiple
        self.encoder = encoder
        self.neck = neck or nn.Identity()
        self.decoder = decoder
        self.num_features = self.head_hidden_size = self.decoder.out_channels[0]
        self.feature_info = [
            {**info, "module": f"encoder.model.{info['module']}"} for info in self.encoder.feature_info.get_dicts()
        ]
        self.head_drop = nn.Dropout2d(drop_rate)
        self.reset_classifier(num_classes)
        self.pretrained_cfg = self.default_cfg = {
            **self.encoder.pretrained_cfg,
            "num_classes": num_classes,
            "classifier": tuple(f"heads.{i}" for i in range(len(self.heads))),
        }

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The decoded maps, fine to coarse, of images whose sides are multiples of `multiple`."""
        return self.decoder(self.neck(self.encoder(x)))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """The encoder's maps (see `feature_info`), and the decoded ones before them unless intermediates_only.

        indices: of the maps to return; the last n for an int, all for None.
        """
        maps = self.encoder(x)
        take, _ = feature_take_indices(len(maps), indices)
        intermediates = [maps[i] for i in take]
        return intermediates if intermediates_only else (self.decoder(self.neck(maps)), intermediates)

    def forward(self, x: Tensor, deep: bool = False) -> Tensor | list[Tensor]:
        """The logits (B, num_classes, H, W) of the finest head; where `deep`, of all heads as `forward_deep`."""
        return self.forward_deep(x) if deep else self._logits(x, heads=1)[0]

    def forward_deep(self, x: Tensor) -> list[Tensor]:
        """The logits (B, num_classes, H, W) of all heads, fine to coarse, for deep supervision."""
        return self._logits(x, heads=len(self.heads))

    def _logits(self, x: Tensor, heads: int) -> list[Tensor]:
        height, width = x.shape[-2:]
        if height < 32 or width < 32:
            raise ValueError(f"input of {height} x {width} pixels: expected at least 32 x 32; enlarge or pad it")
        below, right = -height % self.multiple, -width % self.multiple
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        maps = self.forward_features(x)[:heads]
        logits = [head(self.head_drop(y)) for head, y in zip(self.heads[:heads], maps, strict=True)]
        size = height + below, width + right
        return [F.interpolate(y, size, mode="bilinear")[..., :height, :width] for y in logits]

    def get_classifier(self) -> nn.ModuleList:
        return self.heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads by new ones for num_classes; nothing is pooled here."""
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: expected at least 1; for maps call forward_features")
        self.num_classes = num_classes
        options = get_device_dtype(self)
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 1, **options) for channels in self.decoder.out_channels
        ).train(self.training)
        for name, parameter in self.heads.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)


def _behind_encoder(pattern: str) -> str:
    """A pattern for parameters of the encoder's model -> one for those of the whole network."""
    anchor = re.compile(r"(?<!\[)\^")  # not that of [^...]
    return rf"^encoder\.model\.(?:{anchor.sub('', pattern)})"
