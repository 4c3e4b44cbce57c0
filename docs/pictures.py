"""Pictures of these docs: what one query looks at through routing, windows, halos and neighbourhoods.

    python docs/pictures.py

writes docs/pictures/attention.png. The networks are not trained: the picture shows where they can look, not what at.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from sklearn.datasets import load_sample_image

import visionattn

FOLDER = Path(__file__).parent / "pictures"
NETWORKS = {
    "biformer_tiny": "routing: the regions that are most like its own",
    "va_davit_tiny": "window: its own window",
    "va_halonet26t": "halo: its block and a margin",
    "nat_mini": "neighborhood: the 7 x 7 around it",
}
SIDE, QUERY = 256, (0.5, 0.4)  # pixels; row and column of the query, of the image's sides


def keys_of(name: str, image: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """(H, W), the mean over heads of the weights that a query of the first recorded map of places gives; the query."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad(), visionattn.record_attention(model) as record:
        model(image)
    calls = [call for calls in record.values() for call in calls]
    call = next(call for call in calls if call.kind == "space" and call.indices is not None)
    (height, width), (rows, columns) = call.queries, call.keys
    query = int(QUERY[0] * height), int(QUERY[1] * width)
    row = query[0] * width + query[1]
    weights, keys = call.weights[0, :, row].mean(0), call.indices[0, row]
    seen = torch.zeros(rows * columns).index_add(0, keys.clamp(min=0), weights * (keys >= 0))
    return seen.view(rows, columns).numpy(), query


def main() -> None:
    pixels = load_sample_image("china.jpg")[:, 100:527]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
    shown = image[0].permute(1, 2, 0).clamp(0, 1).numpy()
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(14, 4.2), layout="constrained")
    for axis, (name, words) in zip(axes, NETWORKS.items(), strict=True):
        seen, query = keys_of(name, (image - 0.45) / 0.225)
        step = SIDE / seen.shape[0]
        axis.imshow(shown, extent=(0, SIDE, SIDE, 0))
        axis.imshow(np.ma.masked_less_equal(seen, 0), extent=(0, SIDE, SIDE, 0), cmap="autumn", alpha=0.65)
        axis.plot((query[1] + 0.5) * step, (query[0] + 0.5) * step, "o", color="white", markeredgecolor="black")
        axis.set_title(f"{name}\n{words}", fontsize=10)
        axis.axis("off")
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "attention.png", dpi=90)


if __name__ == "__main__":
    main()
