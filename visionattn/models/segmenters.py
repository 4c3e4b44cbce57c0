"""Any encoder under any decoder: segmenters whose logits have the size of the image.

Decoders are ours or those of segmentation_models_pytorch; for encoders see `visionattn.models.pyramids`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from visionattn.backbones.emcad import EMCAD
from visionattn.backbones.encoder_decoder import EncoderDecoder
from visionattn.backbones.gates import ELA, TripletAttention
from visionattn.errors import UserError
from visionattn.models.networks import create, refuse_unknown
from visionattn.models.pyramids import STRIDES, make_pyramid

__all__ = ["DECODERS", "GATES", "Decoder", "make_segmenter"]


class SmpDecoder(nn.Module):
    """A decoder of segmentation_models_pytorch: maps, fine to coarse -> a list of one map.

    Theirs also take features at strides 1 and 2, of which they use the sizes only where these have no channels.

    Args:
        decoder: theirs.
        out_channels: of its map.
        blanks: how many maps without channels it is given before ours.
    """

    def __init__(self, decoder: nn.Module, out_channels: int, blanks: int = 2) -> None:
        super().__init__()
        initialize_decoder(decoder)
        self.decoder, self.out_channels, self.blanks = decoder, [out_channels], blanks

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        batch, _, height, width = maps[0].shape
        sizes = [(height * 2**i, width * 2**i) for i in range(self.blanks, 0, -1)]
        return [self.decoder([maps[0].new_empty(batch, 0, *size) for size in sizes] + list(maps))]


def _with_image(channels: Sequence[int]) -> list[int]:
    """Channels at strides 2, 4 ... 32 or 4 ... 32 -> at 1, 2, 4 ... 32, as segmentation_models_pytorch counts them."""
    return [3, *([0] * (5 - len(channels))), *channels]


def _unet(channels: list[int], decoder_channels: Sequence[int] = (256, 128, 64, 32, 16), **args: Any) -> nn.Module:
    decoder = UnetDecoder(_with_image(channels), decoder_channels, **args)
    return SmpDecoder(decoder, decoder_channels[-1], 6 - len(channels))


def _unetplusplus(
    channels: list[int], decoder_channels: Sequence[int] = (256, 128, 64, 32, 16), **args: Any
) -> nn.Module:
    decoder = UnetPlusPlusDecoder(_with_image(channels), decoder_channels, **args)
    return SmpDecoder(decoder, decoder_channels[-1], 6 - len(channels))


def _fpn(channels: list[int], **args: Any) -> nn.Module:
    decoder = FPNDecoder(_with_image(channels), **args)
    return SmpDecoder(decoder, decoder.out_channels)


class AveragePool(nn.Module):
    """Adaptive average pooling, (B, C, H, W) -> (B, C, side, side), by products, whose gradient repeats on CUDA."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (_means(size, self.side).to(x) for size in x.shape[2:])
        return rows @ x @ columns.T


def _means(size: int, bins: int) -> Tensor:
    """(bins, size): the weights of the means of `bins` equal parts, which share a place where they do not divide it."""
    part, place = torch.arange(bins)[:, None], torch.arange(size)
    inside = (place >= part * size // bins) & (place < -(-(part + 1) * size // bins))
    return inside / inside.sum(1, keepdim=True)


def _upernet(channels: list[int], decoder_channels: int = 256, **args: Any) -> nn.Module:
    decoder = UPerNetDecoder(_with_image(channels), decoder_channels=decoder_channels, **args)
    for block in decoder.psp.blocks:
        block[0] = AveragePool(block[0].output_size)
    return SmpDecoder(decoder, decoder_channels)


def _segformer(channels: list[int], segmentation_channels: int = 256) -> nn.Module:
    decoder = SegformerDecoder(_with_image(channels), segmentation_channels=segmentation_channels)
    return SmpDecoder(decoder, segmentation_channels)


class DeepLabV3Plus(SmpDecoder):
    """DeepLabV3+ over a pyramid: the map at stride 32 is enlarged to 16, the stride of the paper's last stage."""

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int = 256,
        atrous_rates: Sequence[int] = (12, 24, 36),
        aspp_separable: bool = True,
        aspp_dropout: float = 0.5,
    ) -> None:
        decoder = DeepLabV3PlusDecoder(
            [3, 0, *channels], 5, out_channels, atrous_rates, 16, aspp_separable, aspp_dropout
        )
        super().__init__(decoder, out_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        fine, coarse = maps
        return super().forward([fine, F.interpolate(coarse, scale_factor=2, mode="bilinear")])


class DPT(nn.Module):
    """DPT's decoder over a pyramid, with the convolution of its head: maps, fine to coarse -> a list of one map."""

    def __init__(
        self,
        channels: Sequence[int],
        intermediate_channels: Sequence[int] = (256, 512, 1024, 1024),
        fusion_channels: int = 256,
    ) -> None:
        super().__init__()
        self.decoder = DPTDecoder(channels, STRIDES, False, "ignore", intermediate_channels, fusion_channels)
        self.refine = nn.Sequential(
            nn.Conv2d(fusion_channels, fusion_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(fusion_channels),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        initialize_decoder(self)
        self.out_channels = [fusion_channels]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.refine(self.decoder(list(maps), [None] * len(maps)))]


GATES: dict[str, Callable[[int], nn.Module]] = {"triplet": lambda dim: TripletAttention(), "ela": ELA}


class Gated(nn.Module):
    """A decoder, and for each of the maps it takes a gate that they pass first."""

    def __init__(self, decoder: nn.Module, gates: Sequence[nn.Module]) -> None:
        super().__init__()
        self.decoder, self.gates = decoder, nn.ModuleList(gates)
        self.out_channels = decoder.out_channels

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.decoder([gate(x) for gate, x in zip(self.gates, maps, strict=True)])


class Decoder(NamedTuple):
    """A decoder that is asked for by name.

    Attributes:
        description: one line.
        make: channels of the maps, fine to coarse, and its own keyword arguments -> the decoder (see `EncoderDecoder`).
        strides: of the maps it takes; one at stride 2 is left out where the encoder has none.
        any_size: takes maps of any sizes; else each must have twice the rows and columns of the next.
    """

    description: str
    make: Callable[..., nn.Module]
    strides: tuple[int, ...] = STRIDES
    any_size: bool = False


DECODERS = {
    "emcad": Decoder("EMCAD (2024): gated skips, multi-scale depthwise convolutions, four heads", EMCAD, any_size=True),
    "unet": Decoder("U-Net (2015): skips joined on the way up", _unet, (2, *STRIDES)),
    "unetplusplus": Decoder("U-Net++ (2018): U-Net with nested skips", _unetplusplus, (2, *STRIDES)),
    "fpn": Decoder("FPN (2017): the sum of a feature pyramid", _fpn),
    "deeplabv3plus": Decoder("DeepLabV3+ (2018): dilated convolutions side by side, one skip", DeepLabV3Plus, (4, 32)),
    "upernet": Decoder("UPerNet (2018): pooling at four scales above a feature pyramid", _upernet),
    "segformer": Decoder("SegFormer (2021): a linear layer for each map, joined", _segformer),
    "dpt": Decoder("DPT (2021): residual fusion from coarse to fine", DPT),
}


def make_segmenter(
    encoder_name: str,
    decoder_name: str | None,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    encoder_args: dict[str, Any] | None = None,
    decoder_args: dict[str, Any] | None = None,
) -> EncoderDecoder:
    """An encoder under a decoder: images (B, in_chans, H, W), of 32 x 32 or more -> logits (B, num_classes, H, W).

    Args:
        encoder_name: of a model of timm's registry, ours included.
        decoder_name: a key of `DECODERS`; None where encoder_name is a whole segmenter, such as emcad_pvt_v2_b2.
        pretrained: start from the encoder's published weights.
        encoder_args: keyword arguments for `timm.create_model`.
        decoder_args: keyword arguments for the decoder's own constructor, and `gates`, a key of `GATES`: attention of
            each map that the decoder takes to itself.

    Raises:
        UserError: an unknown encoder or decoder, an encoder that does not fit, an argument they do not take.
    """
    encoder_args, decoder_args = encoder_args or {}, decoder_args or {}
    if decoder_name is not None:
        refuse_unknown("model.decoder", decoder_name, DECODERS, f"visionattn list --decoders: {', '.join(DECODERS)}")
    if decoder_name is None:
        arguments = {**encoder_args, **decoder_args}
        model = create(encoder_name, arguments, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
        if not isinstance(model, EncoderDecoder):
            raise UserError(f"model {encoder_name} is no segmenter: add a decoder, one of {', '.join(DECODERS)}")
        return model
    decoder = DECODERS[decoder_name]
    encoder, neck, channels, multiple = make_pyramid(
        encoder_name, decoder.strides, in_chans, pretrained, encoder_args, decoder.any_size
    )
    gates = decoder_args.get("gates")
    if gates is not None:
        refuse_unknown("model.decoder_args.gates", gates, GATES, f"one of {', '.join(GATES)}")
        decoder_args = {key: value for key, value in decoder_args.items() if key != "gates"}
    try:
        made = decoder.make(channels, **decoder_args)
        if gates is not None:
            made = Gated(made, [GATES[gates](dim) for dim in channels])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"decoder {decoder_name} on maps of {channels} channels of {encoder_name} cannot be made with "
            f"{decoder_args or 'its defaults'}: {error}"
        ) from None
    return EncoderDecoder(encoder, made, num_classes, in_chans, neck, multiple)
