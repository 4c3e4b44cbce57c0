"""Runs what a page of these docs tells people to run, in a folder of its own, and compares what it shows and prints.

    python docs/run.py docs/walks/engineer.md           # compares
    python docs/run.py --write docs/walks/engineer.md   # writes what was printed into the page
    python docs/run.py --keep WALKS docs/walks/*.md     # each page in a folder WALKS/PAGE, which stays

Blocks run in order: `bash` line by line, `python` in one interpreter for the whole page, and a block with a title is
written to the file of that name. A `text` block is what the block before it prints. Numbers and spaces may differ from
machine to machine, words may not.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d.,:e+-]*")


@dataclass
class Block:
    """A fenced block: what it is, where its content stands in the page, and the file that it is written to."""

    language: str
    title: str | None
    content: str
    start: int
    end: int


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2], m[3], m.start(3), m.end(3)) for m in BLOCK.finditer(text)]


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Each `text` block of a page, and what the block before it has printed; in the current folder.

    Raises:
        RuntimeError: a block fails.
    """
    names: dict[str, object] = {}
    printed = ""
    for block in blocks(page.read_text()):
        if block.language == "text":
            yield block, printed
        elif block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.content)
        elif block.language == "bash":
            printed = _shell(block.content, page)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.content, str(page), "exec"), names)
            printed = output.getvalue()


def _shell(commands: str, page: Path) -> str:
    """What commands print; those that install are left out, since what they install is what runs them."""
    lines = [line for line in commands.replace("\\\n", " ").splitlines() if line and "pip install" not in line]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "DOCS": str(Path(__file__).parent)},
    )
    if done.returncode:
        raise RuntimeError(f"{page}: {commands}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def differences(shown: str, printed: str) -> list[str]:
    """Lines of either that the other lacks, numbers and spaces apart."""
    ours, theirs = (
        [" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines()] for text in (shown, printed)
    )
    ours, theirs = (list(filter(None, lines)) for lines in (ours, theirs))
    return (
        []
        if ours == theirs
        else [f"- {x}" for x in ours if x not in theirs] + [f"+ {x}" for x in theirs if x not in ours]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write what was printed into the pages")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run the pages in new folders of their names in it")
    arguments = parser.parse_args()
    wrong = 0
    for page in (page.resolve() for page in arguments.pages):
        began, text, moved = time.monotonic(), page.read_text(), 0
        with contextlib.ExitStack() as stack:
            folder = (arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))) / page.stem
            folder.mkdir(parents=True)
            stack.enter_context(contextlib.chdir(folder))
            for block, printed in run(page):
                if arguments.write:
                    text = text[: block.start + moved] + printed + text[block.end + moved :]
                    moved += len(printed) - len(block.content)
                elif told := differences(block.content, printed):
                    wrong += 1
                    print(f"{page}:", *told, sep="\n")
        if arguments.write:
            page.write_text(text)
        print(f"{page}: {time.monotonic() - began:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
