"""Heads that find a set of objects: each query becomes one object or none.

RT-DETR v2 (Lv et al. 2024, arXiv 2407.17140) and D-FINE (Peng et al. 2024, arXiv 2410.13842), of transformers: hybrid
encoder, decoder and losses. What they lack is added here: images that differ in size, regions that are ignored, boxes
and losses in float32 whatever the precision, group norms that small batches do not disturb. Duplicates are removed as
of other detectors: after a short training there are many (on BCCD, 10 epochs, AP50 was 0.781 with them, 0.834 without).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

from visionattn.models.dense_heads import FCOS, FLOOR, Detections, Objects, Places, group_norm, inside
from visionattn.models.extras import imported

__all__ = ["DFINE", "LEAST_VERSION", "RTDETR", "Projections"]

LEAST_VERSION = "5.6"  # of transformers
NOTHING = -20.0  # logit of what is surely no object
PREFERRED = 1e4  # more than logits differ by
SIDES = 0.01, 0.99  # of an image: the smallest and largest box that a query starts from


class Projections(nn.ModuleList):
    """An encoder's maps -> the same of equal channels.

    Args:
        channels: of the maps.
        width: of the results.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(n, width, 1, bias=False), group_norm(width)) for n in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [project(x) for project, x in zip(self, maps, strict=True)]


class SetHead(nn.Module):
    """Maps (B, C, h, w) at several strides, fine to coarse -> objects.

    Queries are the places of all maps that look most like an object; the decoder moves their boxes layer by layer.

    Args:
        channels: of the maps.
        classes: number of them.
        strides: of the maps.
        sizes: side, in pixels, of the box that a query from each map starts from.
        queries: most objects that an image can have.
        layers: of the decoder.
        gamma: of the varifocal loss.
        overlap: IoU above which the less sure of two detections is a duplicate.
        agnostic: detections of different classes can be duplicates of each other too.
        limit: most objects that are found in an image.
    """

    masks = False
    family = ""
    classifier_names = ("network.decoder.class_embed", "network.enc_score_head", "network.denoising_class_embed")

    def __init__(
        self,
        channels: int,
        classes: int,
        strides: Sequence[int],
        sizes: Sequence[float],
        queries: int = 100,
        layers: int = 6,
        gamma: float = 2.0,
        overlap: float = 0.6,
        agnostic: bool = False,
        limit: int = 100,
    ) -> None:
        super().__init__()
        self.strides, self.sizes, self.queries = tuple(strides), tuple(sizes), queries
        self.overlap, self.agnostic, self.limit = overlap, agnostic, limit
        count, heads = len(strides), channels // math.gcd(32, channels)
        self.network, self.criterion = _parts(
            self.family,
            num_labels=classes,
            d_model=channels,
            encoder_hidden_dim=channels,
            encoder_ffn_dim=4 * channels,
            decoder_ffn_dim=4 * channels,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_in_channels=[channels] * count,
            decoder_in_channels=[channels] * count,
            feat_strides=list(strides),
            num_feature_levels=count,
            decoder_n_levels=count,
            encode_proj_layers=[count - 1],
            decoder_layers=layers,
            focal_loss_gamma=gamma,
            tie_word_embeddings=False,  # of copies of the heads, which are not used here; a single layer has none
            initializer_range=(3 * channels) ** -0.5,  # as torch's own; that of the library is for its checkpoints
        )
        self.network.generate_anchors = self._starts

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps: what is said of them depends on what is asked."""
        return list(maps)

    @property
    def classifier(self) -> nn.Module:
        """Of the last layer, whose results are the detections."""
        return self.network.decoder.class_embed[-1]

    @classmethod
    def reached(
        cls, xyxy: Tensor, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float], well: bool
    ) -> Tensor:
        """Those that surely have a place of the finest map, from which a query can come; more places cost much here."""
        return FCOS.reached(xyxy, strides, sizes, ratios, well=False)

    def losses(self, maps: Sequence[Tensor], sizes: Sequence[Any], targets: Sequence[Objects]) -> dict[str, Tensor]:
        """`class` and `box` of all layers together, per object.

        Args:
            sizes: (h, w) of each image before it was padded.
            targets: the objects of each image.
        """
        zero = 0.0 * self.network.denoising_class_embed.weight.sum()  # which images without objects do not use
        sums = {"class": zero, "box": zero}
        learned = [int((~target.ignore).sum()) for target in targets]
        for members, of_canvas, canvas in self._alike(maps, sizes):
            count = max(1, sum(learned[i] for i in members))
            for name, loss in self._losses(of_canvas, canvas, [targets[i] for i in members]).items():
                kind = "class" if name.startswith("loss_vfl") else "box"
                sums[kind] = sums[kind] + loss * count
        return {name: loss / max(1, sum(learned)) for name, loss in sums.items()}

    def found(self, maps: Sequence[Tensor], sizes: Sequence[Any]) -> list[Detections]:
        """What is found in each image, the surest first."""
        results: dict[int, Detections] = {}
        for members, of_canvas, _ in self._alike(maps, sizes):
            logits, boxes = self.said(of_canvas)
            for i, scores, xyxy in zip(members, logits.sigmoid(), boxes, strict=True):
                results[i] = self._found(scores, xyxy, sizes[i])
        return [results[i] for i in range(len(sizes))]

    def said(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of queries logits (B, Q, classes) and boxes (B, Q, 4) in pixels, of maps that are not padded."""
        last = self._decoded(list(maps))[0][-1]
        canvas = [side * self.strides[0] for side in maps[0].shape[2:]]
        return last["logits"], box_convert(last["pred_boxes"], "cxcywh", "xyxy") * boxes_of(canvas, maps[0])

    def places(self, maps: Sequence[Tensor], size: Sequence[int]) -> Places:
        """The queries of an image of (h, w) pixels, which in others too come from the same places of the maps."""
        looks: list[Tensor] = []
        with self._asked(looks.append):
            logits, boxes = self.said(self._own(maps, size))
        order = looks[0][0].amax(-1).topk(logits.shape[1]).indices

        def prefer(said: Tensor) -> Tensor:
            bonus = PREFERRED * torch.arange(len(order), 0, -1, device=said.device, dtype=said.dtype)
            return said + said.new_zeros(said.shape[1]).scatter(0, order, bonus)[:, None]

        def follow(query: int) -> Callable[[Any], tuple[Tensor, Tensor]]:
            def decoded(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
                with self._asked(prefer):
                    logits = self.said(self._own(maps, size))[0][:, query]
                return logits, logits.sigmoid()

            return decoded

        return Places(logits[0].sigmoid(), boxes[0][:, None], follow)

    def _own(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """The maps of images of one size without what these are padded by."""
        ((_, own, _),) = self._alike(maps, [size] * len(maps[0]))
        return own

    @contextmanager
    def _asked(self, answer: Callable[[Tensor], Any]) -> Iterator[None]:
        """Meanwhile this answers, unless with None, what places of the maps look like (B, P, classes)."""
        hook = self.network.enc_score_head.register_forward_hook(lambda _, inputs, said: answer(said))
        try:
            yield
        finally:
            hook.remove()

    def _found(self, scores: Tensor, boxes: Tensor, size: Sequence[int]) -> Detections:
        flat = scores.flatten()
        order = flat.argsort(descending=True, stable=True)
        order = order[flat[order] > FLOOR]
        xyxy = clip_boxes_to_image(boxes[order // scores.shape[1]], (size[0], size[1]))
        there = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        xyxy, labels, sure = xyxy[there], order[there] % scores.shape[1], flat[order[there]]
        kinds = torch.zeros_like(labels) if self.agnostic else labels
        kept = batched_nms(xyxy, sure, kinds, self.overlap)[: self.limit]
        return Detections(xyxy[kept], labels[kept], sure[kept])

    def round_trip(self, objects: Objects, size: Sequence[int]) -> float:
        """The largest error, in pixels, of the objects of an image (H, W) after they are coded and decoded."""
        canvas = boxes_of(size, objects.xyxy)
        back = box_convert(box_convert(objects.xyxy / canvas, "xyxy", "cxcywh"), "cxcywh", "xyxy") * canvas
        return (back - objects.xyxy).abs().max().item() if len(back) else 0.0

    def _alike(
        self, maps: Sequence[Tensor], sizes: Sequence[Any]
    ) -> Iterator[tuple[list[int], list[Tensor], tuple[int, int]]]:
        """Images whose maps are of one size: which they are, their maps without what others are padded by, pixels."""
        coarsest, members = self.strides[-1], dict[tuple[int, int], list[int]]()
        for i, (height, width) in enumerate(sizes):
            members.setdefault((math.ceil(height / coarsest), math.ceil(width / coarsest)), []).append(i)
        for (rows, columns), chosen in members.items():
            times = [coarsest // stride for stride in self.strides]
            own = [x[chosen, :, : rows * n, : columns * n] for x, n in zip(maps, times, strict=True)]
            yield chosen, own, (rows * coarsest, columns * coarsest)

    def _losses(self, maps: list[Tensor], canvas: tuple[int, int], targets: Sequence[Objects]) -> dict[str, Tensor]:
        """The losses of the library by name."""
        sides = boxes_of(canvas, maps[0])
        labels = [
            {
                "class_labels": target.labels[~target.ignore],
                "boxes": box_convert(target.xyxy[~target.ignore] / sides, "xyxy", "cxcywh"),
                "ignored": target.xyxy[target.ignore] / sides,
            }
            for target in targets
        ]
        layers, out = self._decoded(maps, labels)
        if not all(layer["pred_boxes"].isfinite().all() for layer in layers):
            return {"loss_vfl": layers[-1]["logits"].sum() * math.nan}
        noisy, noise = [], out.denoising_meta_values
        if noise is not None:
            noisy, layers = (
                [{key: x.split(noise["dn_num_split"], 1)[part] for key, x in layer.items()} for layer in layers]
                for part in (0, 1)
            )
        first = {"logits": out.enc_topk_logits, "pred_boxes": out.enc_topk_bboxes.clamp(0, 1)}
        said = layers[-1] | {"auxiliary_outputs": [*layers[:-1], first]}
        if noise is not None:
            said |= {"dn_auxiliary_outputs": noisy, "denoising_meta_values": noise}
        return self.criterion(said, labels)

    def _decoded(self, maps: list[Tensor], labels: list[dict[str, Tensor]] | None = None) -> tuple[list[dict], Any]:
        """What each layer says, as the losses want it, and all that the network gives."""
        encoded = self.network.encoder(inputs_embeds=list(maps))
        encoded.last_hidden_state = [x.float() for x in encoded.last_hidden_state]
        self.network.config.num_queries = min(self.queries, sum(x.shape[-2] * x.shape[-1] for x in maps))
        with torch.autocast(maps[0].device.type, enabled=False):
            out = self.network(None, inputs_embeds=encoded.last_hidden_state[0], encoder_outputs=encoded, labels=labels)
        logits, boxes = out.intermediate_logits.unbind(1), out.intermediate_reference_points.unbind(1)
        layers = [{"logits": x, "pred_boxes": y.clamp(0, 1)} for x, y in zip(logits, boxes, strict=True)]
        if (corners := out.intermediate_predicted_corners) is not None:  # of D-FINE, which the first boxes do not have
            best = {"teacher_corners": corners[:, -1], "teacher_logits": logits[-1]}
            for layer, x, y in zip(
                layers[-corners.shape[1] :], corners.unbind(1), out.initial_reference_points.unbind(1), strict=True
            ):
                layer |= {"pred_corners": x, "ref_points": y} | best
        return layers, out

    def _starts(
        self, shapes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(1, P, 4) logits of the boxes that the places of maps of these shapes start from, and (1, P, 1) all true."""
        height, width = (side * self.strides[0] for side in shapes[0])
        boxes = []
        for (rows, columns), size in zip(shapes, self.sizes, strict=True):
            y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in (rows, columns))
            centres = torch.cartesian_prod(y, x).flip(1)
            boxes.append(torch.cat([centres, centres.new_tensor([size / width, size / height]).expand_as(centres)], 1))
        starts = torch.cat(boxes)[None].clamp(*SIDES).logit()
        return starts, torch.ones_like(starts[..., :1], dtype=torch.bool)


class RTDETR(SetHead):
    """RT-DETR v2."""

    family = "RTDetrV2"


class DFINE(SetHead):
    """D-FINE, whose layers refine the distribution of each side and learn from the last one."""

    family = "DFine"


def boxes_of(size: Sequence[int], like: Tensor) -> Tensor:
    """(4,) what boxes of an image of (H, W) pixels are shares of."""
    return torch.tensor([size[1], size[0]] * 2, dtype=torch.float32, device=like.device)


def _parts(family: str, **settings: Any) -> tuple[Any, Any]:
    """The network without a backbone, and its losses."""
    transformers: Any = imported("transformers", "detr", f"detector {family}", LEAST_VERSION)
    from transformers.loss import loss_d_fine, loss_rt_detr

    maps = settings["num_feature_levels"]
    tiny = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8] * maps,
        depths=[1] * maps,
        layer_type="basic",
        out_indices=list(range(1, maps + 1)),
    )
    config = getattr(transformers, f"{family}Config")(backbone_config=tiny, **settings)
    network = getattr(transformers, f"{family}ForObjectDetection")(config).model
    del network.backbone, network.encoder_input_proj
    criterion = {"RTDetrV2": loss_rt_detr.RTDetrLoss, "DFine": loss_d_fine.DFineLoss}[family]
    parts = network, _ignoring(criterion)(config)
    for part in parts:
        _with_group_norms(part)
        _with_buffers(part)
    return parts


def _ignoring(criterion: Any) -> Any:
    """The losses, which learn nothing from unmatched queries inside regions that are not labelled."""

    class Ignoring(criterion):
        def loss_labels_vfl(self, outputs: dict, targets: list[dict], *more: Any, **options: Any) -> Any:
            matched = self._get_source_permutation_idx(more[0])
            boxes = box_convert(outputs["pred_boxes"].detach(), "cxcywh", "xyxy")
            silent = torch.stack([inside(own, t["ignored"]) for own, t in zip(boxes, targets, strict=True)])
            silent[matched] = False
            logits = outputs["logits"].masked_fill(silent[..., None], NOTHING)
            return super().loss_labels_vfl(outputs | {"logits": logits}, targets, *more, **options)

    return Ignoring


def _with_group_norms(module: nn.Module) -> None:
    """In place of batch norms."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, group_norm(child.num_features))
        else:
            _with_group_norms(child)


def _with_buffers(network: nn.Module) -> None:
    """In place of parameters that are constants."""
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if not value.requires_grad:
                delattr(module, name)
                module.register_buffer(name, value.detach())
