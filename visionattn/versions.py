"""What a run was made with, beside what is installed here; nothing of it is imported, for torch may be missing."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from visionattn.errors import UserError

__all__ = ["format_versions", "versions_of"]


def versions_of(run: Path) -> dict[str, str]:
    """The version of each package that a run directory was trained with; of an exported folder those in its model.json.

    Raises:
        UserError: neither.
    """
    for name in ("environment.json", "model.json"):
        if (run / name).is_file():
            return dict(json.loads((run / name).read_text(encoding="utf-8"))["versions"])
    raise UserError(f"{run}: neither a run directory (environment.json) nor an exported folder (model.json)")


def format_versions(run: Path) -> str:
    """A line for each package: then, now, and a mark where these differ."""
    rows = [("package", "then", "here", "")]
    for name, then in versions_of(run).items():
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "not installed"
        rows.append((name, then, here, "" if then.startswith(here) else "differs"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    )
