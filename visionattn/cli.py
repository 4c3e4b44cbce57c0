"""The command line: `visionattn fit | evaluate | predict | check | list | doctor | benchmark`.

A recipe is read and validated before torch is imported, so mistakes are answered at once. Exit status: 0 done, 1 the
answer is no (`check` found problems, `predict` met unreadable images), 2 the request was wrong, with a message why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn import __version__, recipe
from visionattn.errors import UserError

__all__ = ["main"]


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
        return arguments.function(arguments) or 0
    except UserError as error:
        print(f"visionattn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visionattn: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionattn", description="Attention backbones for vision, trained on real problems."
    )
    parser.add_argument("--version", action="version", version=f"visionattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_fit, _add_evaluate, _add_predict, _add_check, _add_list, _add_doctor, _add_benchmark):
        add(commands)
    return parser


def _add_recipe(command: argparse.ArgumentParser, **options: str) -> None:
    command.add_argument("recipe", help="a recipe's path, or the name of a shipped one, such as quickstart", **options)
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")


def _add_fit(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("fit", help="train, evaluate and report what a recipe says")
    _add_recipe(command, nargs="?")
    command.add_argument("--run", type=Path, metavar="DIR", help="run directory to make (default: runs/NAME-DATE-TIME)")
    command.add_argument("--resume", type=Path, metavar="RUN", help="continue this run where it was interrupted")
    command.set_defaults(function=_fit)


def _fit(arguments: argparse.Namespace) -> None:
    if arguments.resume is not None:
        if arguments.recipe or arguments.overrides or arguments.run:
            raise UserError(
                "--resume RUN goes on with the run's own recipe: give no recipe, override or --run beside it"
            )
        from visionattn.runs.fit import resume

        resume(arguments.resume)
        return
    if arguments.recipe is None:
        raise UserError(f"fit needs a recipe; shipped ones: {', '.join(recipe.shipped())}")
    loaded = recipe.load(arguments.recipe, arguments.overrides)
    from visionattn.runs.fit import fit

    fit(loaded, name=Path(arguments.recipe).stem, run=arguments.run)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("evaluate", help="measure a trained model on labelled images")
    command.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    command.add_argument("--data", type=Path, help="other labelled images: folder of class folders, .npz or .csv")
    command.add_argument("--split", help="train, val or test (default: test where there is one, else val)")
    command.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder to make for the results")
    command.set_defaults(function=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from visionattn.runs.evaluate import evaluate

    evaluate(arguments.model, arguments.data, arguments.split, arguments.out)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("predict", help="write the probabilities of images to a table, or their masks")
    command.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument(
        "-o", "--out", type=Path, required=True, help="table to write (.csv); for masks the folder to make"
    )
    command.add_argument("--polygons", action="store_true", help="of scenes: write a GeoPackage too")
    command.set_defaults(function=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from visionattn.runs.predict import predict

    unread = predict(arguments.model, arguments.images, arguments.out, arguments.polygons)
    return 1 if unread else 0


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("check", help="examine a recipe and its data before training")
    _add_recipe(command)
    command.set_defaults(function=_check)


def _check(arguments: argparse.Namespace) -> int:
    loaded = recipe.load(arguments.recipe, arguments.overrides)
    if loaded.task == "segmentation":
        from visionattn.tasks.segmentation.check import check, format_findings
    else:
        from visionattn.tasks.classification.check import check, format_findings
    findings = check(loaded.data)
    print(format_findings(findings))
    return 1 if findings.problems else 0


def _add_list(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("list", help="our models: size, cost, weights, licence, paper")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as 'biformer*'")
    command.add_argument("--decoders", action="store_true", help="the decoders that a segmenter can have instead")
    command.set_defaults(function=_list)


def _list(arguments: argparse.Namespace) -> None:
    from visionattn.listing import decoder_table, format_table, models

    if arguments.decoders:
        print(decoder_table(arguments.pattern))
    else:
        print(format_table(list(models(arguments.pattern))))


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("doctor", help="versions, devices, and which kernels will be used and why")
    command.set_defaults(function=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from visionattn.environment import doctor

    print(doctor())


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("benchmark", help="time kernels and models against their peers", add_help=False)
    command.set_defaults(function=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> None:
    from visionattn.tools import benchmark

    benchmark.main(arguments.rest)
