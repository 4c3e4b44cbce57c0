"""Exported networks: right in ONNX Runtime, alone with numpy, and with nothing in them of the machine they are from."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml
from odd_images import write_odd_images
from PIL import Image
from small_runs import detector, segmenter, write_blots

import visionattn
from visionattn import UserError
from visionattn.cli import main
from visionattn.inference.deployed import opened
from visionattn.tasks.classification import deployed as classification
from visionattn.tasks.classification import export as of_classifiers
from visionattn.tasks.detection import deployed as detection
from visionattn.tasks.detection import export as of_detectors
from visionattn.tasks.graph import Graph
from visionattn.tasks.segmentation import deployed as segmentation
from visionattn.tasks.segmentation import export as of_segmenters
from visionattn.tools import export
from visionattn.tools._exporters import EXPORTERS
from visionattn.tools._precision import compared


@pytest.fixture(scope="module")
def sure(run, tmp_path_factory) -> Path:
    """A run that is sure of its classes, since of 24 images not one may be lost to rounding."""
    folder = tmp_path_factory.mktemp("sure") / "run"
    return visionattn.fit(run / "recipe.yaml", {"train.epochs": 15}, run=folder).path


@pytest.fixture(scope="module")
def exported(sure, tmp_path_factory) -> export.Exported:
    folder = tmp_path_factory.mktemp("exported") / "stripes"
    return visionattn.load(sure).export(out=folder, precision=["fp16", "int8"])


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    assert write_odd_images(folder) == 50
    return folder


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def predict_alone(folder: Path, images: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    """By a Python that does not find visionattn, torch or torchvision."""
    block = "import sys, runpy; sys.modules |= dict.fromkeys(['visionattn', 'torch', 'torchvision', 'timm']); "
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", block + run, folder / "predict.py", images, "-o", out, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_what_is_written(exported):
    assert sorted(path.name for path in exported.path.iterdir()) == [
        *("check.json", "model-fp16.onnx", "model-int8.onnx", "model.json", "model.onnx", "predict.py"),
    ]
    check = json.loads((exported.path / "check.json").read_text())["model.onnx"]
    assert check == exported.checks["model.onnx"]
    assert 0 <= check["largest_relative_error"] < 1e-4
    assert (check["batches"], check["images"]) == ([1, 3], 3)
    about = json.loads((exported.path / "model.json").read_text())
    assert (about["task"], about["classes"], about["channels"]) == ("classification", ["level", "upright"], 1)
    assert (about["size"], about["resize"], about["temperature"]) == ([32, 32], "squash", 1.0)
    assert len(about["checkpoint_sha256"]) == 64


def test_the_table_alone_is_that_of_predict(exported, sure, odd, tmp_path):
    (odd / "torn.png").write_bytes(b"\x89PNG")
    assert main(["predict", str(sure), str(odd), "-o", str(tmp_path / "ours.csv")]) == 1
    result = predict_alone(exported.path, odd, tmp_path / "alone.csv", "--model", exported.path / "model.onnx")
    assert (result.returncode, result.stderr.count("torn.png")) == (1, 1), result.stderr
    ours, alone = table(tmp_path / "ours.csv"), table(tmp_path / "alone.csv")
    assert len(ours) == 52
    assert [row[:2] for row in alone] == [row[:2] for row in ours]
    for one, other in zip(ours[1:], alone[1:], strict=True):
        assert one[2:] == other[2:] == ["", ""] or np.allclose(np.float64(one[2:]), np.float64(other[2:]), atol=2e-3)
    result = predict_alone(exported.path, odd, tmp_path / "alone.csv", "--model", exported.path / "model-int8.onnx")
    assert result.returncode == 2
    assert "never overwritten" in result.stderr


def test_smaller_files(exported, run, refused, tmp_path, monkeypatch):
    for name in ("fp16", "int8"):
        check = exported.checks[f"model-{name}.onnx"]
        assert check["images"] == 24
        assert check["agreement_with_fp32"] > 0.95
        assert check["accuracy"] > check["accuracy_of_fp32"] - 0.01
        assert 0 < check["largest_change_of_a_probability"] < 0.2
        model = onnx.load(exported.path / f"model-{name}.onnx")
        (about,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == "visionattn")
        assert (about["precision"], about["classes"]) == (name, ["level", "upright"])
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert {"INT8", "FLOAT"} <= kinds
    assert "unknown; did you mean int8?" in refused("export", run, "--precision", "int4", "-o", tmp_path / "out")
    assert "is for --to onnx" in refused("export", run, "--to", "pt2", "--precision", "int8", "-o", tmp_path / "out")


def test_a_smaller_file_that_loses_too_much_is_refused():
    def whole(images):
        return [np.array([[0.4, 0.6]]), np.zeros((1, 2))]

    def small(images):
        return [np.array([[0.6, 0.4]]) if images[0, 0, 0, 0] > 0.9 else np.array([[0.4, 0.6]]), np.zeros((1, 2))]

    spec = SimpleNamespace(data=SimpleNamespace(multi_label=False))
    for labelled, what in ((True, "right"), (False, "equal")):
        inputs = [(torch.full((1, 1, 2, 2), k / 20), {"label": torch.tensor(1)} if labelled else {}) for k in range(20)]
        with pytest.raises(UserError, match=rf"5.0% of {what} decisions are lost on 20 images, more than 1%"):
            compared(small, whole, inputs, Graph(torch.nn.Identity(), [0.0], [1.0]), of_classifiers, spec)


def test_what_calibration_has_found_is_in_the_graph_and_in_the_table(run, pictures, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    recipe = yaml.safe_load(content["visionattn"]["recipe"])
    recipe["evaluate"] |= {
        "tta": ["vflip"],
        "fitted": {"images": 24, "source": "val", "temperature": 2.5, "least": 0.4},
    }
    torch.save(content | {"visionattn": content["visionattn"] | {"recipe": yaml.safe_dump(recipe)}}, checkpoint)
    trained = visionattn.load(tmp_path / "run").trained
    with torch.no_grad():
        probabilities, logits = export.graph_of(trained)(torch.rand(2, 1, 32, 32))
        assert torch.equal(probabilities, (logits / 2.5).softmax(1))
    assert main(["predict", str(tmp_path / "run"), str(pictures / "test"), "-o", str(tmp_path / "ours.csv")]) == 0
    ours = table(tmp_path / "ours.csv")
    assert ours[0][-4:] == ["set", "set_size", "entropy", "mutual_information"]
    monkeypatch.setattr(classification, "Model", lambda _: Alone(trained, of_classifiers, (32, 32)))
    monkeypatch.setattr(
        "sys.argv", ["predict.py", str(pictures / "test"), "-o", str(tmp_path / "a.csv"), "--model", "x"]
    )
    assert classification.main() == 0
    for row, other in zip(ours, table(tmp_path / "a.csv"), strict=True):
        assert row[:2] + row[4:6] == other[:2] + other[4:6]
        numbers = [[float(r[k]) for k in (2, 3, 6, 7)] if row is not ours[0] else [0.0] for r in (row, other)]
        np.testing.assert_allclose(*numbers, atol=1e-4)


def test_no_file_tells_where_it_is_from(exported, run, pictures, tmp_path):
    loaded = visionattn.load(run)
    folders = [exported.path, *(loaded.export(to, tmp_path / to).path for to in ("torchscript", "pt2", "safetensors"))]
    paths = [Path(__file__).parents[2], Path.home(), run, pictures, Path(torch.__file__).parents[1], tmp_path]
    for file in (file for folder in folders for file in folder.iterdir()):
        content = file.read_bytes()
        assert not [path for path in paths if str(path).encode() in content], file
        assert not [name for name in (b"00.png", b"upright/") if name in content], file


@pytest.mark.parametrize("to", ["pt2", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_programs_of_torch(to, run, tmp_path):
    loaded = visionattn.load(run)
    folder = loaded.export(to, tmp_path / to).path
    x = torch.rand(5, 1, 32, 32)
    if to == "pt2":
        extra = {"visionattn": ""}
        program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
        assert json.loads(extra["visionattn"])["classes"] == ["level", "upright"]
    else:
        program = torch.jit.load(folder / "model.pt")
    with torch.no_grad():
        probabilities, logits = program(x)
        data = loaded.recipe.data
        expected = loaded.model((x - data.mean[0]) / data.std[0])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, expected.softmax(1), rtol=1e-4, atol=1e-5)


def test_weights_alone(run, tmp_path):
    from safetensors import safe_open

    loaded = visionattn.load(run)
    folder = loaded.export("safetensors", tmp_path / "weights").path
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert json.loads(weights.metadata()["visionattn"])["model"] == "biformer_tiny"
        own = loaded.model.state_dict()
        assert set(weights.keys()) == set(own)
        assert all(torch.equal(weights.get_tensor(key), own[key]) for key in own)


def test_what_is_refused_leaves_nothing(exported, run, refused, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "unknown format; did you mean onnx?" in refused("export", run, "--to", "onx", "-o", out)
    assert "never overwritten" in refused("export", run, "-o", exported.path)
    assert "--size 20: expected any, or height,width of" in refused("export", run, "--size", "20", "-o", out)
    monkeypatch.setattr(export, "LARGEST_ERROR", 0.0)
    message = refused("export", run, "--to", "torchscript", "--size", "32,40", "-o", out)
    assert "the exported file is wrong at 32 x 40 pixels, batch" in message
    assert list(tmp_path.iterdir()) == []


def test_several_sizes_are_a_file_each(run, tmp_path):
    folder = visionattn.load(run).export("torchscript", tmp_path / "sizes", size=[32, "48,40"])
    assert list(folder.checks) == ["model-32x32.pt", "model-48x40.pt"]
    assert json.loads((folder.path / "model-48x40.json").read_text())["size"] == [48, 40]


def test_a_file_for_all_sizes_is_right_at_all_or_refused(run, refused, tmp_path):
    message = refused("export", run, "--to", "torchscript", "--size", "any", "-o", tmp_path / "out")
    assert "--size any: a trace is right at the size that it was made for only" in message
    assert not (tmp_path / "out").exists()
    assert export.sizes_of(["any", 64]) == [None, (64, 64)]
    images = torch.rand(1, 1, 40, 48)

    class Half(Graph):
        def forward(self, images):
            return images / 2, images

    graph = Half(torch.nn.Identity(), [0.0], [1.0])
    assert export.error_of(lambda x: [(x / 2).numpy(), x.numpy()], graph, images) == 0
    with pytest.raises(UserError, match=r"at 40 x 48 pixels, batch 1: logits differ .* by 0.5 .*; give"):
        export.error_of(lambda x: [(x / 2).numpy(), x.numpy() / 2], graph, images, "; give the sizes")
    with pytest.raises(UserError, match="does not run at 40 x 48 pixels, batch 1: ZeroDivisionError"):
        export.error_of(lambda x: 1 // 0, graph, images)


def test_the_search_for_a_graph_for_all_sizes_ends(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LONGEST", 0.2)
    with pytest.raises(UserError, match=r"no graph for all sizes in 0\.2 seconds; nothing was kept; give the sizes"):
        visionattn.load(run).export(out=tmp_path / "any", size="any")
    assert not (tmp_path / "any").exists()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"crashed in its search .*\(SIGSEGV\); nothing was kept; give"),
        (lambda: os._exit(3), r"crashed in its search .*\(exit status 3\)"),
        (lambda: 1 // 0, r"cannot be exported so: ZeroDivisionError.*; nothing was kept; give the sizes"),
    ],
)
def test_a_search_that_crashes_is_refused_with_what_ended_it(end, message, tmp_path):
    exporter = EXPORTERS["pt2"]._replace(write=lambda *arguments: end())
    graph = Graph(torch.nn.Identity(), [0.0], [1.0])
    with pytest.raises(UserError, match=message):
        export.written(exporter, graph, [torch.rand(1, 1, 32, 32)] * 2, tmp_path / "model.pt2", {})


@pytest.mark.slow
def test_one_file_for_all_sizes(run, odd, tmp_path):
    exported = visionattn.load(run).export(out=tmp_path / "any", size="any")
    assert exported.checks["model.onnx"]["sizes"] == [[32, 32], [33, 41], [64, 32]]
    assert main(["predict", str(run), str(odd), "-o", str(tmp_path / "ours.csv")]) == 0
    result = predict_alone(exported.path, odd, tmp_path / "alone.csv")
    assert result.returncode == 0, result.stderr
    ours, alone = table(tmp_path / "ours.csv"), table(tmp_path / "alone.csv")
    assert [row[:2] for row in alone] == [row[:2] for row in ours]


def test_images_to_check_on_have_to_be_there(run, pictures, tmp_path):
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    about = checkpoint["visionattn"]
    moved = about["recipe"].replace(str(pictures), str(tmp_path / "gone"))
    torch.save(checkpoint | {"visionattn": about | {"recipe": moved}}, tmp_path / "best.ckpt")
    loaded = visionattn.load(tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"checked on validation images, .*gone.*: give images by --data"):
        loaded.export("torchscript")
    assert loaded.export("torchscript", data=pictures / "val").path == tmp_path / "export-torchscript"


def test_scenes_keep_their_values(tmp_path, capsys):
    bands = np.random.default_rng(0).integers(0, 4000, (8, 9, 5)).astype(np.uint16)
    np.save(tmp_path / "scene.npy", bands)
    about = {"values": "as stored", "channels": 5}
    ((_, image),) = opened([tmp_path / "scene.npy"], about)
    np.testing.assert_array_equal(image, bands.transpose(2, 0, 1))
    ((_, image),) = opened([tmp_path / "scene.npy"], about | {"channels": 4})
    assert image is None
    assert "5 bands, but the model was trained on 4" in capsys.readouterr().err


class Alone:
    """Stands for an exported file, and computes what its graph does."""

    def __init__(self, trained, part, size):
        self.graph = export.graph_of(trained)
        self.about = export.known_of(trained) | part.contract(trained.recipe, size)
        self.about |= {"size": list(size), "trained_at": list(trained.recipe.data.side)}

    def __call__(self, images):
        with torch.no_grad():
            results = self.graph(torch.from_numpy(np.ascontiguousarray(images, np.float32)))
        return dict(zip(self.graph.OUTPUTS, (result.numpy() for result in results), strict=True))


@pytest.fixture(scope="module")
def blots(tmp_path_factory) -> Path:
    return write_blots(tmp_path_factory.mktemp("made") / "blots")


@pytest.mark.parametrize(
    ("resize", "tta"), [("none", ["hflip"]), pytest.param("squash", ["rot90"], marks=pytest.mark.slow)]
)
def test_masks_alone_are_those_of_the_run(resize, tta, blots, tmp_path):
    loaded = segmenter(blots, tmp_path / "run", resize, tta)
    model = Alone(loaded.trained, of_segmenters, (64, 64))
    for path in sorted((blots / "images").glob("*.png"))[:2]:
        image = np.array(Image.open(path))[None]
        if resize == "none":
            image = np.pad(image, ((0, 0), (0, 50), (0, 0)), mode="reflect")
        (expected,) = loaded.predict(image[0])
        maps = segmentation.probabilities_of(model, image)
        assert maps.shape == (2, *image.shape[1:])
        assert np.allclose(maps.sum(0), 1, atol=1e-5)
        assert (maps.argmax(0) == expected.mask).mean() > 0.999


@pytest.mark.parametrize(
    ("resize", "name"),
    [
        ("fit", "fcos"),
        pytest.param("fit", "faster_rcnn", marks=pytest.mark.slow),
        *(pytest.param("none", name, marks=pytest.mark.slow) for name in ("retinanet", "rt_detr")),
    ],
)
def test_objects_alone_are_those_of_the_run(resize, name, blots, tmp_path):
    loaded = detector(blots, tmp_path / "run", resize, name)
    model = Alone(loaded.trained, of_detectors, (64, 64))
    number = 0
    for path in sorted((blots / "images").glob("*.png"))[:2]:
        pixels = np.array(Image.open(path))
        pixels = np.pad(pixels, ((0, 50), (0, 0))) if resize == "none" else pixels[:60, :60]
        (expected,) = loaded.predict(pixels)
        boxes = detection.found(model, pixels[None].astype(np.float32) / 255)
        order, other = (np.lexsort([*b.xyxy.round(2).T, b.labels]) for b in (boxes, expected.boxes))
        np.testing.assert_allclose(boxes.xyxy[order], expected.boxes.xyxy[other], atol=0.05)
        np.testing.assert_allclose(boxes.scores[order], expected.boxes.scores[other], atol=1e-4)
        number += len(boxes)
    assert number


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_dense_predictions_of_a_file_are_those_of_predict(task, blots, odd, tmp_path):
    make = {"segmentation": segmenter, "detection": detector}[task]
    loaded = make(blots, tmp_path / "run", *{"segmentation": ("none", []), "detection": ("fit", "fcos")}[task])
    folder = loaded.export(out=tmp_path / "exported").path
    out = {"segmentation": "masks", "detection": "found.csv"}[task]
    assert main(["predict", str(loaded.path), str(odd), "-o", str(tmp_path / out)]) == 0
    result = predict_alone(folder, odd, tmp_path / f"alone_{out}")
    assert result.returncode == 0, result.stderr
    if task == "detection":
        ours, alone = ([row[0] for row in table(tmp_path / name)] for name in (out, f"alone_{out}"))
        apart = Counter(ours)
        apart.subtract(alone)
        assert sum(map(abs, apart.values())) <= len(ours) / 100  # where rounding decides about the least score or IoU
        return
    for path in (tmp_path / out).glob("*.png"):
        assert (
            np.array(Image.open(path)) == np.array(Image.open(tmp_path / f"alone_{out}" / path.name))
        ).mean() > 0.999
