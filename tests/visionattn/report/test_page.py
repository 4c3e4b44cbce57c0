"""The report says what the files of a run say, in one page that needs nothing else."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import auc

from visionattn.data.images import ImageArray
from visionattn.data.prediction import Prediction
from visionattn.report.page import write_report
from visionattn.tasks.classification.evaluation import measure
from visionattn.tasks.classification.recipe import Recipe

LAND = [
    "annual crops under irrigation", "permanent crops and orchards", "pasture and natural grassland",
    "broad-leaved deciduous forest", "coniferous evergreen forest", "transitional woodland and shrub",
    "inland wetland, marsh and peat bog", "river or canal", "lake or reservoir", "coastal lagoon and salt marsh",
    "continuous urban fabric", "discontinuous urban fabric", "industrial or commercial site", "port area",
    "airport", "mineral extraction site",
]  # fmt: skip
FINDINGS = [
    "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
    "consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia",
]  # fmt: skip
EPOCHS = 50


def labels_and_probabilities(classes: int, images: int, multi_label: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a classifier that is mostly right, less so for later classes, and rather too sure of itself."""
    rng = np.random.default_rng(seed)
    if multi_label:
        labels = (rng.random((images, classes)) < np.linspace(0.3, 0.02, classes)).astype(int)
        logits = 2.2 * labels * np.linspace(1.4, 0.7, classes) - 2.5 + rng.normal(0, 1.2, labels.shape)
        return labels, 1 / (1 + np.exp(-logits))
    labels = rng.permutation(np.arange(images) % classes)
    logits = rng.normal(0, 1, (images, classes))
    logits[np.arange(images), labels] += rng.normal(np.linspace(4.5, 2.5, classes)[labels], 1.3)
    logits[np.arange(images), (labels + 1) % classes] += 1.2
    return labels, np.exp(1.4 * logits) / np.exp(1.4 * logits).sum(1, keepdims=True)


def write_table(path: Path, head: list[str], rows: list[list]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def write_evaluation(
    folder: Path, classes: list[str], images: int, multi_label: bool = False, seed: int = 0, epoch: int = 41
) -> dict:
    """What `fit` and `evaluate` leave of such a classifier; returns the content of metrics.json."""
    labels, belief = labels_and_probabilities(len(classes), images, multi_label, seed)
    data = {"format": "folder", "root": Path("/data"), "classes": classes, "multi_label": multi_label}
    spec = Recipe(task="classification", model={"name": "biformer_tiny"}, data=data, evaluate={"bootstrap": 5})
    samples = []
    for i, label in enumerate(labels):
        name, pixels = f"test/{i % 7}/image_{i:05d}.png", thumbnail(i % 40, 1 if i % 2 else 3)
        target = label.astype(np.float32) if multi_label else int(label)
        samples.append(ImageArray(name, name, name, None, pixels.shape[:2], label=target, pixels=pixels))
    predictions = [Prediction(i, row) for i, row in enumerate(belief.astype(np.float32))]
    evaluation = measure(predictions, samples, spec, folder.name)
    evaluation.about |= {"checkpoint": "checkpoints/best.ckpt", "epoch": epoch, "tta": []}
    evaluation.write(folder)
    return json.loads((folder / "metrics.json").read_text())


def thumbnail(seed: int, channels: int) -> np.ndarray:
    """A blurry picture: noise enlarged; every third one is wide."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, channels), dtype=np.uint8).squeeze()
    return np.array(Image.fromarray(noise).resize((160, 110 if seed % 3 else 160), Image.Resampling.BICUBIC))


def write_training(run: Path, epochs: int, multi_label: bool = False) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for epoch in range(epochs):
        done, noise = 1 - np.exp(-epoch / 9), rng.normal(0, 0.008, 5)
        lr = 5e-4 * min((epoch + 1) / 5, 0.5 + 0.5 * np.cos(np.pi * epoch / epochs))
        losses = [2.2 - 2.05 * done + noise[0], 2.1 - 1.8 * done + 0.006 * epoch + 3 * noise[1]]
        quality = [0.3 + 0.64 * done + noise[2], 0.28 + 0.65 * done + noise[3], 0.25 + 0.67 * done + noise[4]]
        quality += [0.7 + 0.28 * done, 0.5 + 0.45 * done, 0.2 - 0.15 * done]
        rows.append([epoch + 1, (epoch + 1) * 150, lr, *losses, *quality, 84.2])
    names = ["accuracy", "balanced_accuracy", "f1", "auroc", "average_precision", "calibration_error"]
    head = ["epoch", "step", "lr", "train/loss", "val/loss", *(f"val/{name}" for name in names), "seconds"]
    write_table(run / "metrics.csv", head, rows)


def write_start(run: Path, data: dict, images: dict[str, int], epochs: int = EPOCHS, **more: list[str]) -> None:
    """The files that are there from the first minute of a run."""
    run.mkdir(parents=True)
    recipe = {
        "task": "classification",
        "model": {"name": "biformer_tiny", "pretrained": True, "drop_path_rate": 0.1},
        "data": data | {"image_size": 224, "batch_size": 32},
        "optim": {"name": "adamw", "lr": 0.0005, "schedule": "cosine", "warmup_epochs": 5},
        "train": {"epochs": epochs, "seed": 0, "monitor": None},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {
        "command": "visionattn fit recipes/classification/example.yaml train.epochs=50",
        "python": "3.11.7",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "device": "NVIDIA H200",
        "threads": 16,
        "versions": {"visionattn": "0.1.0", "torch": "2.9.0", "timm": "1.0.20", "lightning": "2.6.0"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "started": "2025-11-21T09:12:03+00:00",
        "seed": 0,
        "data": {"images": images, "fingerprint": "89ab12cd34ef5678"} | more,
    }
    (run / "environment.json").write_text(json.dumps(environment))


def write_end(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"finished": "2025-11-21T10:24:40+00:00", "seconds": 4357.2}
    (run / "environment.json").write_text(json.dumps(environment))


def make_run(root: Path, name: str, classes: list[str], *, multi_label: bool = False, images: int = 600) -> Path:
    """A finished run: recipe, environment, metrics, validation and test."""
    run = root / name
    source = {"format": "folder", "root": f"/data/{name.rsplit('-', 2)[0]}"}
    write_start(run, source, {"train": 8 * images, "val": images, "test": images})
    write_training(run, EPOCHS, multi_label)
    write_evaluation(run / "evaluation" / "val", classes, images, multi_label, seed=1)
    write_evaluation(run / "evaluation" / "test", classes, images, multi_label, seed=2)
    write_end(run)
    return run


RUNS = {
    "digits": ([str(k) for k in range(10)], False, 600),
    "binary": (["normal", "pneumonia"], False, 624),
    "land": (LAND, False, 800),
    "findings": (FINDINGS, True, 800),
    "species": ([f"species {k:03d}" for k in range(120)], False, 480),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> Path:
    classes, multi_label, images = RUNS[request.param]
    name = f"{request.param}-20251121-091203"
    return make_run(tmp_path_factory.mktemp("runs"), name, classes, multi_label=multi_label, images=images)


class Page(HTMLParser):
    """What a browser would find in a page; refuses tags that are not closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def said(self, *tags: str) -> list[str]:
        """Texts directly inside these tags, with plain spaces."""
        return [re.sub(r"\s+", " ", text).strip() for tag, text in self.texts if tag in tags]

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


def table_after(page: Page, heading: str) -> str:
    """The text of the first table after a heading."""
    return re.search(rf"<h3>{heading}</h3>.*?</table>", page.html, re.DOTALL)[0]


def numbers(pattern: str, text: str) -> np.ndarray:
    """(matches, groups) of the numbers that a pattern finds."""
    return np.array([[float(number) for number in match.groups()] for match in re.finditer(pattern, text)])


def test_the_page_is_whole_and_needs_nothing_else(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.partial"))
    assert path.stat().st_size < 3_000_000
    page = Page(path)
    assert not re.search(r"(?i)https?:|url\(|@import|<link|<iframe", page.html)
    assert all(source.startswith("data:image/") for source in page.values("src"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.values("href")} == set(ids)
    assert page.said("h2") == [
        "Results", "Training", "Test images", "Validation images", "Recipe", "Environment",
    ]  # fmt: skip
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert page.html.count('role="img"><title>') == page.html.count('role="img"')


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_the_numbers_are_those_of_the_files(run):
    page = Page(write_report(run))
    cells, small = page.said("td"), page.said("small")
    for split in ("val", "test"):
        result = json.loads((run / "evaluation" / split / "metrics.json").read_text())
        percent = {"accuracy", "top5", "balanced_accuracy", "calibration_error"}
        for name, value in result["overall"].items():
            assert (f"{100 * value:.1f} %" if name in percent else f"{value:.3f}") in cells
        low, high = result["intervals"][result["headline"]]
        shown = f"{low:.3f} – {high:.3f}" if result["multi_label"] else f"{100 * low:.1f} – {100 * high:.1f} %"
        assert shown in small
        for row in result["per_class"]:
            for name in ("precision", "recall", "f1", "auroc", "average_precision"):
                assert f"{row[name]:.3f}" in cells
    lead = " ".join(page.said("p", "strong"))
    assert f"on {result['samples']} test images" in lead.replace(",", "")
    assert "50 epochs" in lead


def test_the_mistakes_are_shown_with_truth_prediction_and_file(run):
    page = Page(write_report(run))
    for split in ("val", "test"):
        with (run / "evaluation" / split / "mistakes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            assert row["name"] in page.said("div")
            assert (row["label"].replace(";", ", ") or "none") in page.said("dd")
            assert f"{100 * float(row['confidence']):.1f} %" in page.said("dd")
    assert len(page.values("src")) == 24


def test_the_calibration_diagram_has_the_error_of_the_file(run):
    """Gaps, weighed by the bars' heights, add up to torchmetrics' calibration error."""
    html = write_report(run).read_text(encoding="utf-8")
    result = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    figure = re.search(r"<h4>Calibration.*?</svg>", html, re.DOTALL)[0]
    gaps = numbers(r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="gap"', figure)
    bars = numbers(r'height="([\d.]+)" class="share"', figure)[::-1, 0]  # drawn behind, so the last comes first
    error = (np.abs(gaps[:, 0] - gaps[:, 1]) * bars).sum() / bars.sum() ** 2
    assert error == pytest.approx(result["overall"]["calibration_error"], abs=0.003)


def test_roc_curves_have_the_area_and_the_threshold_of_the_file(run):
    html = write_report(run).read_text(encoding="utf-8").split('id="evaluation-1"')[0]
    result = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    several, classes = result["multi_label"], result["classes"]
    figures = re.findall(r"<title>ROC curve of .*?</svg>", html, re.DOTALL)
    assert len(figures) == (len(classes) if several else len(classes) == 2)
    confusion = result["confusion"] if several else [result["confusion"]]
    for figure, row, ((tn, fp), (fn, tp)) in zip(
        figures, result["per_class"][-len(figures) :], confusion, strict=False
    ):
        x, y = numbers(r"([\d.]+),([\d.]+)", re.search(r'points="(.*?)"', figure)[1]).T
        across, up = (x - x[0]) / (x[-1] - x[0]), (y - y[0]) / (y[-1] - y[0])
        assert auc(across, up) == pytest.approx(row["auroc"], abs=0.01)
        (dot,) = numbers(r'cx="([\d.]+)" cy="([\d.]+)"', figure)
        assert (dot[0] - x[0]) / (x[-1] - x[0]) == pytest.approx(fp / (fp + tn), abs=0.01)
        assert (dot[1] - y[0]) / (y[-1] - y[0]) == pytest.approx(tp / (tp + fn), abs=0.01)


def test_the_confusion_is_a_matrix_while_it_can_be_read(run):
    page = Page(write_report(run))
    result = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    counts = np.array(result["confusion"])
    if result["multi_label"]:
        shown = numbers(r"<td>(\d+)</td>" * 4, table_after(page, "Confusion"))
        assert shown.tolist() == counts.reshape(-1, 4)[:, [3, 2, 1, 0]].tolist()
    elif len(counts) <= 50:
        cells = re.findall(r"<td[^>]*>(\d*)</td>", table_after(page, "Confusion matrix"))
        assert [int(cell or 0) for cell in cells] == counts.ravel().tolist()
    else:
        shown = numbers(r"<td>(\d+)</td>", table_after(page, "Most confused pairs"))[:, 0]
        np.fill_diagonal(counts, 0)
        assert shown.tolist() == sorted(counts.ravel(), reverse=True)[:30]


def test_names_from_the_data_are_text_and_never_markup(tmp_path):
    classes = ["<script>alert(1)</script>", 'a"b', "c&amp;d", "$name"]
    run = make_run(tmp_path, "<b>run & co", classes, images=80)
    page = Page(write_report(run))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in [tag for tag, _ in page.tags]
    assert "<b>run & co" in page.said("h1")
    headings = page.said("th")
    assert all(name in headings for name in classes)


def test_one_epoch_without_a_test(tmp_path):
    run = tmp_path / "short"
    notes = {"warnings": ["3 images in more than one split"], "skipped": ["scan_04.png: truncated <file>"]}
    write_start(run, {"format": "builtin", "name": "mnist_5k"}, {"train": 400, "val": 100}, epochs=1, **notes)
    write_training(run, 1)
    result = write_evaluation(run / "evaluation" / "val", ["a", "b", "c"], 100, epoch=1)
    page = Page(write_report(run))
    assert page.said("h2") == ["Results", "Training", "Validation images", "Recipe", "Environment"]
    assert "trained on mnist_5k for 1 epoch, reaches" in " ".join(page.said("p"))
    assert f"{100 * result['overall']['accuracy']:.1f} % accuracy" in page.said("strong")
    assert page.said("li")[:2] == ["3 images in more than one split", "left out: scan_04.png: truncated <file>"]
    training = page.html.split('id="evaluation-0"')[0]
    assert set(re.findall(r'text-anchor="middle">([\d.]+)<', training)) == {"1"}


def test_a_run_under_way_shows_what_there_is(tmp_path):
    assert Page(write_report(tmp_path)).said("h2") == []
    run = tmp_path / "run"
    write_start(run, {"format": "builtin", "name": "mnist_5k"}, {"train": 400, "val": 100})
    assert Page(write_report(run)).said("h2") == ["Recipe", "Environment"]
    write_training(run, 12)
    page = Page(write_report(run))
    assert page.said("h2") == ["Training", "Recipe", "Environment"]
    assert "12 of 50" in page.said("dd")
    for unfinished in (".val.x1y2", "val.partial"):  # as this version and 0.1.0 leave them when they are killed
        (run / "evaluation" / unfinished).mkdir(parents=True)
        (run / "evaluation" / unfinished / "metrics.json").write_text("{")
    assert Page(write_report(run)).said("h2") == ["Training", "Recipe", "Environment"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("small"), "run", ["a", "b"], images=80)


@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", "environment.json", "metrics.csv", "evaluation/val/metrics.json", "evaluation/test/predictions.csv",
     "evaluation/test/mistakes.csv", "evaluation/test/mistakes/00.png"],
)  # fmt: skip
def test_any_file_may_be_missing(small, tmp_path, name):
    run = shutil.copytree(small, tmp_path / "run")
    (run / name).unlink()
    assert "Test images" in Page(write_report(run)).said("h2")


def test_undefined_values_are_dashes(tmp_path):
    run = make_run(tmp_path, "run", ["a", "b", "c"], images=80)
    path = run / "evaluation" / "test" / "metrics.json"
    result = json.loads(path.read_text())
    result["per_class"][1] |= dict.fromkeys(["precision", "recall", "f1", "auroc", "average_precision"])
    result["overall"]["auroc"] = float("nan")
    result["intervals"] = {}
    path.write_text(json.dumps(result))
    with (run / "metrics.csv").open("a") as file:
        file.write("50,7650,,nan,,,,,,,,\n")
    page = Page(write_report(run))
    assert page.said("td").count("–") == 6
    assert "nan" not in page.said("td", "text")


def test_further_evaluations_are_shown_under_their_own_name(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    result = write_evaluation(run / "evaluation" / "hospital_b", ["a", "b"], 60, seed=5)
    page = Page(write_report(run))
    assert "hospital_b images" in page.said("h2")
    assert "hospital_b" in page.said("th")
    assert f"{result['overall']['accuracy']:.1%}".replace("%", " %") in page.said("td")
