"""The command line: `visionattn fit | evaluate | calibrate | predict | explain | check | new | list | doctor | ...`.

A recipe is read and validated before torch is imported, so mistakes are answered at once. Exit status: 0 done, 1 the
answer is no (`check` found problems, `predict` met unreadable images), 2 the request was wrong, with a message why, 130
interrupted, 141 nobody reads the output any more, 143 terminated.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import FrameType

from visionattn import __version__, recipe
from visionattn.errors import UserError

__all__ = ["main"]

OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a file without a name: files that we write have one


class _Console(logging.Handler):
    """What visionattn has to say: remarks on stdout, warnings on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        print(f"{'warning: ' if warning else ''}{record.getMessage()}", file=sys.stderr if warning else sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.function is _benchmark:
        arguments.rest = rest
    elif rest:  # overrides that stand behind an option
        wrong = [
            text for text in rest if "=" not in text or text.startswith("-") or not hasattr(arguments, "overrides")
        ]
        if wrong:
            parser.error(f"unknown arguments: {' '.join(wrong)}")
        arguments.overrides += rest
    try:
        with _on_console(), _stopped_by_signals():
            status: int = arguments.function(arguments) or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        _give_up_output()
        print("visionattn: stopped, since what read the output has ended", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except OSError as error:
        message = str(error)
        if error.filename is not None:
            message = f"{error.filename}: could not be read or written ({error.strerror})"
        elif error.errno in OUTPUT_FAILS:
            _give_up_output()
            message = f"the output of this command could not be written ({error.strerror})"
        print(f"visionattn: {message}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"visionattn: {error}", file=sys.stderr)
        return 2
    except _Stopped as stopped:
        print(f"visionattn: {stopped}", file=sys.stderr)
        return 128 + stopped.number


def _give_up_output() -> None:
    """What is still to be printed goes nowhere: it may be what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _on_console() -> Iterator[None]:
    """What visionattn logs is shown."""
    logger, console = logging.getLogger("visionattn"), _Console()
    before = logger.level, logger.propagate
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(console)
        logger.level, logger.propagate = before


class _Stopped(BaseException):
    """A signal told the command to end; files that are half written are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end what is done inside, wherever it is: Lightning passes over them while it predicts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: what is half written is being removed
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionattn", description="Attention backbones for vision, trained on real problems."
    )
    parser.add_argument("--version", action="version", version=f"visionattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        *(
            _add_fit,
            _add_evaluate,
            _add_calibrate,
            _add_predict,
            _add_explain,
            _add_check,
            _add_new,
            _add_list,
            _add_doctor,
            _add_benchmark,
        ),
        *(_add_export, _add_publish, _add_convert, _add_completion),
    ):
        add(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, about: str, *examples: str) -> argparse.ArgumentParser:
    shown = "\n".join(["examples:", *(f"  visionattn {name} {example}".rstrip() for example in examples)])
    return commands.add_parser(
        name, help=about, description=about, epilog=shown, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_recipe(command: argparse.ArgumentParser, optional: bool = False) -> None:
    about = "a recipe's path, or the name of a shipped one, such as quickstart"
    command.add_argument("recipe", help=about, nargs="?" if optional else None)
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")


def _add_fit(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "fit",
        "train, evaluate and report what a recipe says",
        "quickstart",
        "scenes.yaml train.epochs=20 optim.lr=1e-4 --run runs/first",
    )
    _add_recipe(command, optional=True)
    command.add_argument("--run", type=Path, metavar="DIR", help="run directory to make (default: runs/NAME-DATE-TIME)")
    command.add_argument("--resume", type=Path, metavar="RUN", help="continue this run where it was interrupted")
    command.add_argument(
        "--dry-run", action="store_true", help="train two batches, say what the run would take, leave nothing behind"
    )
    command.set_defaults(function=_fit)


def _fit(arguments: argparse.Namespace) -> None:
    if arguments.resume is not None:
        if arguments.recipe or arguments.overrides or arguments.run or arguments.dry_run:
            raise UserError(
                "--resume RUN goes on with the run's own recipe: give no recipe, override or other option beside it"
            )
        from visionattn.runs import fit

        _summarize(fit.resume(arguments.resume))
        return
    if arguments.recipe is None:
        raise UserError(f"fit needs a recipe; shipped ones: {', '.join(recipe.shipped())}")
    loaded = recipe.load(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        from visionattn.runs.dry_run import dry_run

        print(dry_run(loaded))
        return
    from visionattn.runs import fit

    _summarize(fit.fit(loaded, Path(arguments.recipe).stem, arguments.run))


def _summarize(run: Path) -> None:
    from visionattn.report.evaluation import format_table
    from visionattn.runs.directory import RunDirectory
    from visionattn.runs.processes import is_first

    if is_first():
        places = ("val", "test", "val-last", "test-last")
        evaluated = {evaluation.folder.name: evaluation for evaluation in RunDirectory(run).evaluations}
        evaluations = [evaluated[name] for name in places if name in evaluated]
        print(f"\n{format_table(evaluations)}\n\nreport: {run / 'report.html'}")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "evaluate",
        "measure a trained model on labelled images",
        "runs/scenes-20261121-120000",
        "runs/scenes-20261121-120000 --data other_scenes --split test -o results",
    )
    command.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    command.add_argument("--data", type=Path, help="other labelled images: folder of class folders, .npz or .csv")
    command.add_argument("--split", help="train, val or test (default: test where there is one, else val)")
    command.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder to make for the results")
    command.set_defaults(function=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from visionattn.report.evaluation import format_table
    from visionattn.runs.evaluate import evaluate

    evaluation = evaluate(arguments.model, arguments.data, arguments.split, arguments.out)
    print(f"\n{format_table([evaluation])}\n\nresults: {evaluation.folder}")
    if arguments.model.is_dir():
        print(f"report: {arguments.model / 'report.html'}")


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "calibrate",
        "measure on held-out images how far a model's probabilities can be trusted, and keep it in its checkpoint",
        "runs/scenes-20261121-120000 --conformal 0.1",
        "runs/scenes-20261121-120000 --data other_patients --ood knn",
        "runs/fold0 runs/fold1 runs/fold2",
    )
    command.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="several: all folds, each on what it has not seen",
    )
    command.add_argument("--data", type=Path, help="other labelled images (default: those that fit validated on)")
    command.add_argument("--split", help="train, val or test (default: val where there is one)")
    command.add_argument("--conformal", type=float, help="share of the truth that sets may miss, such as 0.1")
    command.add_argument("--ood", choices=["knn"], help="tell images that are like none of those trained on")
    command.set_defaults(function=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from visionattn.api import Run

    options = {name: getattr(arguments, name) for name in ("data", "split", "conformal", "ood")}
    fitted = Run(*arguments.models).calibrate(**options)
    for name, value in fitted.model_dump(exclude_none=True).items():
        print(f"{name:<12}{value:.6g}" if isinstance(value, float) else f"{name:<12}{value}")


def _add_predict(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "predict",
        "write the probabilities of images to a table, or their masks or objects into a folder",
        "runs/scenes-20261121-120000 new_scenes more/*.png -o predictions.csv",
        "runs/fold0 runs/fold1 runs/fold2 new_scenes -o predictions.csv",
    )
    command.add_argument(
        "model", type=Path, metavar="RUN|CHECKPOINT", help="of several, one after the other, the mean is predicted"
    )
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument(
        "-o", "--out", type=Path, required=True, help="table to write (.csv); for masks and objects the folder to make"
    )
    command.add_argument("--polygons", action="store_true", help="of scenes: write a GeoPackage too")
    command.add_argument(
        "--class-numbers",
        action="store_true",
        help="masks hold 0, 1, 2, ... (default: what the recipe's own masks say, such as data.values)",
    )
    command.add_argument(
        "--uncertainty",
        action="store_true",
        help="of masks: maps too of their entropy, of what networks and views disagree on, and of where a class may be",
    )
    command.add_argument(
        "--format", help="of objects: csv, coco, voc, yolo, labels, geojson or gpkg (default: a table and pictures)"
    )
    command.add_argument("--score", type=float, help="of objects: the least score (default: as chosen on validation)")
    command.add_argument(
        "--continue", dest="resume", action="store_true", help="go on with masks: what is there is whole, and is kept"
    )
    command.set_defaults(function=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from visionattn.runs.predict import predict

    names = ("polygons", "resume", "class_numbers", "uncertainty", "format", "score")
    options = {name: getattr(arguments, name) for name in names}
    more = list(takewhile(_is_model, arguments.images))
    images = arguments.images[len(more) :]
    if not images:
        raise UserError(f"predict: {arguments.images[-1]} is a model; no images are given")
    written, unread = predict([arguments.model, *more], images, arguments.out, **options)
    print(f"{written} predicted, {unread} unreadable: {arguments.out}")
    return 1 if unread else 0


def _is_model(path: Path) -> bool:
    return path.suffix == ".ckpt" or (path / "environment.json").is_file()


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "export",
        "write a trained network as a file that runs without visionattn, checked on validation images",
        "runs/scenes-20261121-120000 --to onnx -o scenes_onnx",
        "runs/scenes-20261121-120000 --size 224 --size 448,320 --precision int8",
    )
    command.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    command.add_argument("--to", default="onnx", metavar="FORMAT", help="onnx (default), pt2, torchscript, safetensors")
    command.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder to make (default: export-FORMAT in RUN)")
    command.add_argument(
        "--size", action="append", default=[], metavar="H,W|any", help="of images; several: a file each"
    )
    command.add_argument(
        "--precision", action="append", default=[], metavar="fp16|int8", help="of ONNX: write a smaller file too"
    )
    command.add_argument("--data", type=Path, metavar="IMAGES", help="to check on (default: the validation images)")
    command.set_defaults(function=_export)


def _export(arguments: argparse.Namespace) -> None:
    from visionattn.api import load

    options = {name: getattr(arguments, name) for name in ("size", "precision", "data")}
    exported = load(arguments.model).export(arguments.to, arguments.out, **options)
    for name, check in exported.checks.items():
        print(f"{exported.path / name}: {', '.join(f'{key} {value}' for key, value in check.items())}")


def _add_publish(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "publish",
        "write a run as a folder for the Hugging Face hub, from which timm makes the network; nothing is sent",
        "runs/scenes-20261121-120000 -o scenes_hub --data-licence cc-by-4.0",
    )
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("-o", "--out", type=Path, metavar="FOLDER", required=True, help="folder to make")
    command.add_argument(
        "--licence", metavar="ID", help="of the weights (default: the strictest of code, start weights and data)"
    )
    command.add_argument("--data-licence", metavar="ID", help="of the training data")
    command.set_defaults(function=_publish)


def _publish(arguments: argparse.Namespace) -> None:
    from visionattn.tools.publish import publish

    out = publish(arguments.run, arguments.out, arguments.licence, arguments.data_licence)
    print(f"look through {out / 'README.md'}, then: hf upload USER/{out.name} {out}")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "convert",
        "write weights under other key names: ours, the authors' or timm's",
        "biformer_tiny_best.pth ours.safetensors --model biformer_tiny --to ours",
        "runs/scenes-20261121-120000 theirs.pth --model biformer_tiny --to authors --like biformer_tiny_best.pth",
    )
    command.add_argument("source", type=Path, metavar="IN", help="a checkpoint, or a run of a classifier")
    command.add_argument("out", type=Path, metavar="OUT", help="file to write, .safetensors or .pth")
    command.add_argument("--model", required=True, metavar="NAME", help="our name of the network")
    command.add_argument("--to", required=True, metavar="NAMES", help="ours, authors or timm")
    command.add_argument("--like", type=Path, metavar="FILE", help="for authors: a checkpoint that has their names")
    command.set_defaults(function=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from visionattn.tools.convert import convert

    names = convert(arguments.source, arguments.out, arguments.model, arguments.to, arguments.like)
    print(f"{len(names)} entries: {arguments.out}")


def _add_explain(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "explain",
        "show what predictions depend on, and whether that is to be trusted",
        "runs/scenes-20261121-120000 new_scenes -o explained --check",
        "runs/landcover-20261121-120000 scene.tif -o explained --target water --region 100,80,160,120 --method ig",
    )
    command.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument(
        "--method",
        default="layercam,ig",
        help="layercam, ig, gradcam, gradient, occlusion, rollout, relevance, attention, class-attention, or several",
    )
    command.add_argument("--target", default="predicted", help="predicted, label, or the name or number of a class")
    command.add_argument(
        "--region", help="of masks and objects: X,Y or X,Y,X2,Y2 in pixels; of masks predicted, or the file of a mask"
    )
    command.add_argument("--layer", help="of layercam, gradcam and attention (default: chosen by the method)")
    command.add_argument("--query", metavar="X,Y", help="of attention: the pixel whose weights are shown")
    command.add_argument("--head", default="mean", help="of attention: mean, or the number of a head")
    command.add_argument("--heads", action="store_true", help="write how much each head counts instead")
    command.add_argument(
        "--check", action="store_true", help="measure maps against edges, chance and a network with shuffled weights"
    )
    command.add_argument("--format", help="png, html, npy, geotiff, nifti, or several (default: as the data want it)")
    command.set_defaults(function=_explain)


def _explain(arguments: argparse.Namespace) -> None:
    from visionattn.tools.explain_command import explain_files, wanted_of

    asked = ("method", "target", "region", "layer", "query", "head")
    wanted = wanted_of(**{name: getattr(arguments, name) for name in asked})
    formats = arguments.format.split(",") if arguments.format else []
    options = {"check": arguments.check, "heads": arguments.heads, "formats": formats}
    print("\n".join([*explain_files(arguments.model, arguments.images, arguments.out, wanted, **options)]))
    print(f"explained: {arguments.out}")


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "check",
        "examine a recipe and its data before training",
        "scenes.yaml",
        "classification/medmnist data.root=pneumoniamnist.npz",
    )
    _add_recipe(command)
    command.set_defaults(function=_check)


def _check(arguments: argparse.Namespace) -> int:
    loaded = recipe.load(arguments.recipe, arguments.overrides)
    from visionattn.runs.check import check

    findings = check(loaded)
    print(findings)
    return 1 if findings.problems else 0


def _add_new(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "new", "write a commented recipe to start from", "classification > mine.yaml", "segmentation"
    )
    command.add_argument("task", choices=recipe.tasks())
    command.set_defaults(function=_new)


def _new(arguments: argparse.Namespace) -> None:
    from visionattn.recipe.template import template

    print(template(arguments.task), end="")


def _add_list(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "list",
        "our models: size, cost, weights, licence, paper",
        "'biformer*'",
        "va_davit_tiny --details",
    )
    command.add_argument("pattern", nargs="?", default="*", help="a name, or a shell pattern such as 'biformer*'")
    command.add_argument("--min-params", type=float, metavar="M", help="least number of parameters, in millions")
    command.add_argument("--max-params", type=float, metavar="M", help="largest number of parameters, in millions")
    command.add_argument("--licence", metavar="PART", help="models whose licence's name has this in it, such as mit")
    command.add_argument("--pretrained", action="store_true", help="models with published weights")
    command.add_argument("--details", action="store_true", help="all that is known about each, and where it is from")
    command.add_argument("--decoders", action="store_true", help="the decoders that a segmenter can have instead")
    command.add_argument("--detectors", action="store_true", help="the detectors that a network can have instead")
    command.set_defaults(function=_list)


def _list(arguments: argparse.Namespace) -> None:
    from visionattn import listing

    filters = {key: getattr(arguments, key) for key in ("min_params", "max_params", "licence", "pretrained")}
    if not (arguments.decoders or arguments.detectors):
        models = listing.list_models(arguments.pattern, **filters)
        print(listing.format_details(models) if arguments.details else listing.format_table(models))
    elif arguments.details or any(filters.values()):
        raise UserError("--decoders and --detectors go with a pattern only: filters and --details are for models")
    else:
        print((listing.detector_table if arguments.detectors else listing.decoder_table)(arguments.pattern))


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "doctor", "versions, devices, and which kernels will be used and why", "", "> doctor.txt"
    )
    command.add_argument(
        "--kernels",
        action="store_true",
        help="try the GPU kernels: right and faster here? compiled models read the answer",
    )
    about = "a run directory or an exported folder: the versions that it was made with, beside those here"
    command.add_argument("run", type=Path, nargs="?", metavar="RUN", help=about)
    command.set_defaults(function=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    if arguments.run is not None:
        from visionattn.versions import format_versions

        print(format_versions(arguments.run))
        return
    from visionattn.environment import doctor, doctor_of_kernels

    print(doctor_of_kernels() if arguments.kernels else doctor())


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("benchmark", help="time kernels and models against their peers", add_help=False)
    command.set_defaults(function=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> None:
    from visionattn.tools import benchmark

    benchmark.main(arguments.rest)


def _add_completion(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands,
        "completion",
        "the script that completes this command in a shell (needs the package shtab)",
        "bash > ~/.local/share/bash-completion/completions/visionattn",
        "zsh > ~/.zfunc/_visionattn",
    )
    command.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    command.set_defaults(function=_completion)


def _completion(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError:
        raise UserError("completion needs the package shtab: pip install shtab") from None
    print(shtab.complete(_parser(), shell=arguments.shell))
