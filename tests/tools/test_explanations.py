"""`visionattn explain`: maps of what predictions depend on, where they are right, files, and what is refused."""

import csv
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio
import timm
import torch
from PIL import Image
from torch import nn

import visionattn
from visionattn import recipe
from visionattn.cli import main
from visionattn.data import formats
from visionattn.errors import UserError
from visionattn.recipe import part_of
from visionattn.runs.checkpoints import Trained
from visionattn.tasks.targets import Asked
from visionattn.tools.attribution import METHODS, Question, head_importance, layers_of
from visionattn.tools.explained_files import save
from visionattn.tools.explanations import Wanted, explained


class Linear(nn.Module):
    """Logits that are weighed sums of the pixels."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, *size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * self.weight).sum((2, 3, 4))

    def get_classifier(self) -> nn.Module:
        return self


def test_gradients_of_a_linear_network_are_its_terms():
    """Gradient times image, and integrated gradients, whose first steps are then complete."""
    torch.manual_seed(0)
    network, image = Linear((6, 8)).eval(), torch.randn(1, 6, 8)
    for method in ("gradient", "ig"):
        (found,) = visionattn.explain(network, image, method=method, target=2)
        np.testing.assert_allclose(found.map, (image * network.weight[2])[0].detach(), rtol=1e-5, atol=1e-6)
        assert found.map.sum() == pytest.approx(network(image[None])[0, 2].item(), rel=1e-4)
    assert found.note.startswith("16 steps, 0.0%")
    assert found.score == pytest.approx(network(image[None]).softmax(1)[0, 2].item())


def test_occlusion_is_what_the_output_loses():
    """Of a linear network: the mean over the squares of a pixel of the sum of the terms inside."""
    torch.manual_seed(0)
    network, image = Linear((12, 12)).eval(), torch.randn(1, 12, 12)
    (found,) = visionattn.explain(network, image, method="occlusion", target=0)
    terms = (image * network.weight[0])[0].detach().numpy()
    total, count = np.zeros((12, 12)), np.zeros((12, 12))
    for top in range(11):  # squares of 2 pixels, one apart
        for left in range(11):
            total[top : top + 2, left : left + 2] += terms[top : top + 2, left : left + 2].sum()
            count[top : top + 2, left : left + 2] += 1
    np.testing.assert_allclose(found.map, total / count, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def biformer() -> nn.Module:
    torch.manual_seed(0)
    options = {"depth": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "head_dim": 16, "n_win": 2, "topks": (1, 2, 4, -2)}
    return timm.create_model("biformer_tiny", num_classes=3, **options).eval()


def test_cam_is_its_definition(biformer):
    """By the map and its gradient, taken by hand."""
    image = torch.randn(3, 64, 96)
    for method, number in (("gradcam", 3), ("layercam", 0)):
        (found,) = visionattn.explain(biformer, image, method=method, target=1)
        x = image[None]
        maps = []
        with torch.enable_grad():
            outputs = biformer.forward_stages(x)
            for _ in range(4):
                maps.append(next(outputs))
                maps[-1].retain_grad()
            biformer.forward_head(next(outputs))[0, 1].backward()
        slope = maps[number].grad if method == "layercam" else maps[number].grad.mean((2, 3), keepdim=True)
        expected = (maps[number] * (slope.clamp(min=0) if method == "layercam" else slope)).sum(1).clamp(min=0)
        assert found.layer == f"stages.{number}"
        enlarged = torch.nn.functional.interpolate(expected[None], (64, 96), mode="bilinear")[0, 0]
        np.testing.assert_allclose(found.map, enlarged.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["va_xcit_nano_12_p16_224", "va_convit_tiny", "deit_tiny_patch16_224", "resnet18"])
def test_every_method_has_a_map_or_says_why_not(name):
    depth = {} if "resnet" in name else {"depth": 2} | ({"local_up_to_layer": 1} if "convit" in name else {})
    size = {"img_size": (48, 64)} if "deit" in name else {}
    network = timm.create_model(name, num_classes=3, **depth, **size).eval()
    refused = {}
    for method in METHODS:
        try:
            (found,) = visionattn.explain(network, torch.randn(3, 48, 64), method=method)
        except UserError as error:
            refused[method] = str(error)
            continue
        assert found.map.shape == (48, 64)
        assert np.isfinite(found.map).all()
        assert found.map.any() or method in ("layercam", "gradcam"), method  # of a network that has learned nothing
    channels = {"attention": "the network's attention is over channels, or of places that are not known"}
    nothing = dict.fromkeys(("rollout", "relevance", "attention", "class-attention"), "no attention was recorded")
    expected = {"resnet18": nothing, "va_xcit_nano_12_p16_224": channels}.get(name, {})
    assert refused.keys() == expected.keys()
    assert all(refused[method].startswith(text) for method, text in expected.items())
    assert all(text.endswith("take layercam, gradcam, ig or occlusion") for text in refused.values())


def test_attention_of_a_query_is_its_true_row(biformer):
    image = torch.randn(3, 64, 64)
    (found,) = visionattn.explain(biformer, image, method="attention", query=(40, 8), layer="stages.0.0.attn", head=0)
    with visionattn.record_attention(biformer) as record, torch.no_grad():
        biformer(image[None])
    (call,) = record["stages.0.0.attn"]
    place = 2 * 16 + 10  # of 16 x 16 places of 4 pixels
    row = np.zeros(256)
    np.add.at(row, call.indices[0, place], call.weights[0, 0, place])
    cells = found.map.reshape(16, 4, 16, 4).mean((1, 3))
    assert np.corrcoef(cells.ravel(), row)[0, 1] > 0.9  # enlarged between the centres of places
    assert found.outside == 0


def test_head_importance_ranks_as_heads_that_are_cut_off():
    """Heads with the largest and the smallest importance, cut off one at a time."""
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_patch16_224", num_classes=3, depth=3, img_size=48).eval()
    images = torch.randn(8, 3, 48, 48)
    total: dict = {}
    for image in images:
        for layer, head, importance in head_importance(Question(network, image, lambda x: network(x)[:, 0])):
            total[layer, head] = total.get((layer, head), 0) + importance
    order = sorted(total, key=total.get)

    @torch.no_grad()
    def loss(layer: str, head: int) -> float:
        weight = network.get_submodule(layer).proj.weight
        kept, dim = weight.clone(), weight.shape[1] // 3
        before = network(images)[:, 0]
        weight[:, head * dim : (head + 1) * dim] = 0
        change = (network(images)[:, 0] - before).abs().mean().item()
        weight.copy_(kept)
        return change

    assert np.mean([loss(*head) for head in order[-3:]]) > np.mean([loss(*head) for head in order[:3]])


def test_of_a_run_from_the_command_line(run, pictures, tmp_path, capsys):
    out = tmp_path / "explained"
    images = [pictures / "test" / "level" / f"{i:02d}.png" for i in range(2)]
    words = ["explain", str(run), *map(str, images), "-o", str(out), "--check", "--method", "layercam,gradient"]
    assert main(words) == 0
    assert re.search(r"^gradient: .*\(\d\)", capsys.readouterr().out, re.M)
    assert {f.name for f in out.iterdir()} == {
        *("index.html", "explanations.csv"),
        *(f"{i:02d}-{method}.png" for i in range(2) for method in ("layercam", "gradient")),
    }
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
    with (out / "explanations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["method"]) for row in rows] == [
        (f"{i:02d}", method) for i in range(2) for method in ("layercam", "gradient")
    ]
    assert all(0 <= float(row["score"]) <= 1 and row["target"] in ("level", "upright") for row in rows)
    verdicts = {"passes", "no better than edges", "no better than chance", "does not depend on the class"}
    assert {row["verdict"] for row in rows} <= verdicts | {"does not depend on what was learned"}
    assert all(-1 <= float(row[name]) <= 1 for row in rows for name in ("stability", "shuffled_head", "deletion"))


def test_from_python_in_pixels_of_the_file(run, pictures):
    """What a crop leaves out of the image is 0 in the map; signed maps have both colours."""
    loaded = visionattn.load(run)
    image = Image.open(pictures / "test" / "upright" / "00.png").resize((60, 40))
    found = loaded.explain(image, method=["ig", "rollout"], target="upright")
    assert [one.method for one in found] == ["ig", "rollout"]
    assert found[0].map.shape == (40, 60)
    assert found[0].map.min() < 0 < found[0].map.max()
    assert found[1].outside is not None
    assert found[0].overlay().size == (60, 40)
    assert "blind to the class" in found[1].note
    probability = loaded.predict(image)[0].probabilities["upright"]
    assert found[0].score == pytest.approx(probability, abs=1e-3)


def test_label_is_that_of_the_recipes_data(run, pictures, tmp_path, refused):
    images = pictures / "test" / "level"
    words = [run, images / "00.png", "--target", "label", "--method", "gradient"]
    assert main(["explain", *map(str, words), "-o", str(tmp_path / "a")]) == 0
    assert "level" in (tmp_path / "a" / "explanations.csv").read_text().splitlines()[1]
    Image.open(images / "00.png").save(tmp_path / "other.png")
    words[1] = tmp_path / "other.png"
    assert "other.png: name a class" in refused("explain", *words, "-o", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert {f.name for f in images.iterdir()} == {f"{i:02d}.png" for i in range(12)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--layer", "stages.0"], "layer is of layercam, gradcam, attention"),
        (["--query", "3,4"], "query is of attention"),
        (["--head", "1"], "head is of attention"),
    ],
)
def test_what_no_method_takes_is_refused(asked, words, run, pictures, tmp_path, refused):
    image = pictures / "test" / "level" / "00.png"
    message = refused("explain", run, image, "--method", "gradient", *asked, "-o", tmp_path / "out")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_heads_of_a_run(run, pictures, tmp_path):
    words = ["explain", str(run), str(pictures / "test" / "level"), "-o", str(tmp_path / "out"), "--heads"]
    assert main(words) == 0
    with (tmp_path / "out" / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows} == {f"stages.{i}.0.attn" for i in range(4)}
    assert all(float(row["importance"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "layrcam"], "method layrcam: expected .*did you mean layercam"),
        (["--target", "uprigt"], "target is uprigt, expected .*did you mean upright"),
        (["--target", "7"], "target is 7, expected a class name, its number 0 to 1"),
        (["--layer", "stages.9"], r"layer stages.9 has no map, expected one of stages.0, .*did you mean stages"),
        (["--region", "1,2,3,4"], "region is for masks and objects"),
        (["--query", "3"], "--query is 3: expected X,Y"),
        (["--query", "900,3", "--method", "attention"], r"query \(900.0, 3.0\) is in no part of the image"),
        (["--head", "last"], "--head is last: expected mean or a number"),
        (["--head", "9", "--method", "attention"], r"head 9: layer stages.3.0.attn has heads 0 to"),
        (["--format", "jpg"], "format jpg: expected png"),
        (["--format", "geotiff"], "the image is no scene"),
    ],
)
def test_what_cannot_be_explained_is_said_and_nothing_is_left(run, pictures, tmp_path, refused, words, message):
    image = pictures / "test" / "level" / "00.png"
    assert re.search(message, refused("explain", run, image, "-o", tmp_path / "out", *words))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(run, pictures, tmp_path, refused):
    (tmp_path / "out").mkdir()
    answer = refused("explain", run, pictures / "test" / "level" / "00.png", "-o", tmp_path / "out")
    assert "results are never overwritten" in answer
    assert not list((tmp_path / "out").iterdir())
    (found,) = visionattn.explain(Linear((6, 6)).eval(), torch.randn(1, 6, 6), method="gradient")
    found.save(tmp_path / "map.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), found.map)
    with pytest.raises(UserError, match="never overwritten"):
        found.save(tmp_path / "map.npy")
    with pytest.raises(UserError, match="expected a name that ends with"):
        found.save(tmp_path / "map.gif")


def test_layers_with_maps():
    network = timm.create_model("va_xcit_nano_12_p16_224", depth=2)
    assert list(layers_of(network)) == ["blocks.0", "blocks.1"]
    assert layers_of(nn.Linear(2, 2)) == {}


DATA = "image_size: 64, classes: [ground, water, crops], mean: [0.4, 0.4, 0.4], std: [0.2, 0.2, 0.2]"
LEVELS = "finest: 8, coarsest: 16, sizes: [64, 128]"
QUERIES = ", queries: 20, layers: 2"
BIFORMER = (
    "{name: biformer_tiny, args: {depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, "
    "topks: [1, 2, 4, -2]}"
)


def untrained(text: str) -> Trained:
    """A task of a resolved recipe with the weights that it starts from."""
    torch.manual_seed(0)
    spec = recipe.loads(text, name="test")
    return Trained(part_of(spec.task, "task").make(spec).eval(), spec, Path(), 0)


@pytest.fixture(scope="module")
def segmenter() -> Trained:
    return untrained(
        f"task: segmentation\nmodel: {BIFORMER}, decoder: fpn}}\ndata: {{format: geotiff, root: ., {DATA}}}\n"
    )


def scene(path: Path, height: int = 150, width: int = 100) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (3, height, width), np.uint8)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": height, "width": width}
    grid = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)
    with rasterio.open(path, "w", crs="EPSG:32633", transform=grid, **profile) as sink:
        sink.write(pixels)
    return path


def test_a_region_of_a_scene_on_its_own_grid(segmenter, tmp_path):
    """Of the windows of 64 pixels that the region touches; the map lies where they are."""
    samples, _ = formats.unlabelled([scene(tmp_path / "a.tif")], segmenter.recipe.data, 3)
    wanted = Wanted(("ig", "layercam", "rollout"), target="water", region="70,70,90,80")
    found = list(explained(segmenter, samples, wanted))
    assert [one.method for one in found] == ["ig", "layercam", "rollout"]
    for one in found:
        assert one.window == (slice(64, 128), slice(36, 100))
        assert one.map.shape == (64, 64)
    assert found[0].target == "water"
    assert np.abs(found[0].map).sum() > 0
    found[0].save(tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as source, rasterio.open(tmp_path / "a.tif") as of:
        assert source.crs == of.crs
        assert source.transform == rasterio.Affine(10, 0, 500_360, 0, -10, 3_999_360)
        np.testing.assert_array_equal(source.read(1), found[0].map)
        assert source.tags()["target"] == "water"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"region": "900,2"}, r"region 900,2 is outside of a.*150 rows and 100 columns"),
        ({"region": "9,2,3,4"}, "region is 9,2,3,4: expected X,Y or X,Y,X2,Y2 with X < X2"),
        ({"region": "nothing.png"}, "region is nothing.png: expected predicted, X,Y"),
        ({"region": np.ones((3, 3))}, "region has 3 x 3 pixels, the image 150 x 100"),
        ({"target": "snow"}, "target is snow, expected a class name"),
        ({"target": "label"}, "target is label, but the image has none"),
    ],
)
def test_regions_that_are_none_are_refused(segmenter, tmp_path, wanted, message):
    samples, _ = formats.unlabelled([scene(tmp_path / "a.tif")], segmenter.recipe.data, 3)
    with pytest.raises(UserError, match=message):
        list(explained(segmenter, samples, Wanted(("gradient",), **wanted)))


def test_too_many_windows_are_refused(segmenter, tmp_path):
    samples, _ = formats.unlabelled([scene(tmp_path / "a.tif", 1000, 1000)], segmenter.recipe.data, 3)
    with pytest.raises(UserError, match=r"256 windows of 64 x 64 pixels, at most 64 .*give a smaller region"):
        list(explained(segmenter, samples, Wanted(("gradient",))))


class WaterInTheCorner(nn.Module):
    """Predicts water (class 1) in the first pixel of a window, where that is bright, and ground elsewhere."""

    device = torch.device("cpu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 3, *images.shape[2:])
        logits[:, 0] = 1
        logits[:, 1, 0, 0] = images[:, 0, 0, 0] * 10
        return logits


def test_what_only_a_window_predicts_whose_business_it_is_not_is_explained_as_the_whole(segmenter, tmp_path):
    """The last row of windows begins at row 86, which belongs to the one before it, up to row 128."""
    path = scene(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as sink:
        pixels = np.zeros((3, 150, 100), np.uint8)
        pixels[:, 86, 0] = 255
        sink.write(pixels)
    samples, _ = formats.unlabelled([path], segmenter.recipe.data, 3)
    shown = part_of("segmentation", "explain").seen(WaterInTheCorner(), samples[0], segmenter.recipe, Asked("water"))
    assert [one.place for one in shown] == [(top, left, top + 64, left + 64) for top in (0, 64, 86) for left in (0, 36)]
    assert sum(int(one.region.sum()) for one in shown) == 150 * 100


def test_slices_become_a_volume_on_its_own_grid(tmp_path):
    trained = untrained(
        f"task: segmentation\nmodel: {BIFORMER}, decoder: fpn}}\n"
        "data: {format: nifti, root: ., image_size: 32, classes: [ground, organ], mean: [0.4], std: [0.2]}\n"
    )
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    voxels = np.random.default_rng(0).normal(size=(40, 36, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    samples, _ = formats.unlabelled([tmp_path / "scan.nii.gz"], trained.recipe.data, 1)
    found = list(explained(trained, samples, Wanted(("gradient",), target="organ")))
    assert [one.name for one in found] == ["scan-000", "scan-001", "scan-002"]
    save(found, tmp_path / "map.nii.gz")
    written = nibabel.load(tmp_path / "map.nii.gz")
    assert written.shape == (40, 36, 3)
    np.testing.assert_array_equal(written.affine, affine)
    total = np.sort([np.abs(one.map).sum() for one in found])
    np.testing.assert_allclose(np.sort(np.abs(written.get_fdata()).sum((0, 1))), total, rtol=1e-5)


@pytest.mark.parametrize(
    "detector",
    [
        "fcos",
        "faster_rcnn",
        "rt_detr",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask_rcnn", "d_fine")),
    ],
)
def test_a_found_object_is_followed_by_its_place(detector, tmp_path):
    levels = LEVELS + (QUERIES if detector in ("rt_detr", "d_fine") else "")
    trained = untrained(
        f"task: detection\nmodel: {BIFORMER}, detector: {detector}, detector_args: {{{levels}}}}}\n"
        f"data: {{format: coco, root: ., annotations: a.json, resize: fit, {DATA}}}\nevaluate: {{max_objects: 20}}\n"
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(tmp_path / "a.png")
    samples, _ = formats.unlabelled([tmp_path / "a.png"], trained.recipe.data, 3)
    wanted = Wanted(("gradient", "layercam"), target="water")
    found = list(explained(trained, samples, wanted))
    asked = Asked("water")
    (part,) = part_of("detection", "explain").seen(trained.task, samples[0], trained.recipe, asked)
    network = trained.task.network
    with torch.no_grad():
        places = network.head.places(network.predicted([part.image]), part.image.shape[1:])
        best, place = places.scores[:, 1].max(0)
        raw = network.predicted([part.image, part.image * 0])
        here, elsewhere = places.follow(int(place))(raw)[1][:, 1]  # of another image the same place, region or query
    assert here == pytest.approx(best.item(), rel=1e-4) != elsewhere.item()
    assert [one.score for one in found] == pytest.approx([best.item()] * 2, rel=1e-4)
    assert re.fullmatch(r"water at -?\d+, -?\d+, -?\d+, -?\d+", found[0].target)
    assert found[0].map.shape == (96, 128)
    assert found[0].map.any()


def test_the_report_shows_the_worst_and_the_best_images(run):
    with (run / "evaluation" / "test" / "explained.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == 3 * ["worst"] + 3 * ["best"]
    with (run / "evaluation" / "test" / "predictions.csv").open() as file:
        believed = {row["name"]: float(row[f"p:{row['label']}"]) for row in csv.DictReader(file)}
    assert all((run / "evaluation" / "test" / row["file"]).is_file() for row in rows)
    worst = min(believed, key=believed.get)
    assert rows[0]["image"].split("/")[-1].removesuffix(".png") in worst
    assert "What predictions depend on" in (run / "report.html").read_text()
    assert not (run / "evaluation" / "val" / "explained.csv").exists()
