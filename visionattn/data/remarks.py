"""What libraries remark while they read a file, told with its name.

Pillow and pydicom warn, nibabel and rasterio log, and hardly one of their remarks says which file it is about.
"""

import logging
import threading
import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["names_its_file"]

log = logging.getLogger(__name__)
Options = ParamSpec("Options")
Read = TypeVar("Read")
_READING = threading.local()


def names_its_file(
    read: Callable[Concatenate[Path, Options], Read],
) -> Callable[Concatenate[str | Path, Options], Read]:
    """A function that reads the file that is its first argument, whose libraries' remarks then name it."""

    @wraps(read)
    def naming(path: str | Path, *arguments: Options.args, **keys: Options.kwargs) -> Read:
        _listen()
        outer, _READING.path = getattr(_READING, "path", None), path
        try:
            return read(Path(path), *arguments, **keys)
        finally:
            _READING.path = outer

    return naming


@cache
def _listen() -> None:
    make_record, show_warning = logging.getLogRecordFactory(), warnings.showwarning
    told: set[str] = set()

    def record(
        name: str, level: int, source: str, line: int, message: Any, values: Any, *rest: Any, **keys: Any
    ) -> Any:
        path = getattr(_READING, "path", None)
        if path is not None and not name.startswith("visionattn") and Path(path).name not in str(message):
            message = f"{str(path).replace('%', '%%') if values else path}: {message}"
        return make_record(name, level, source, line, message, values, *rest, **keys)

    def warn(message: Warning | str, category: type[Warning], *place: Any, **keys: Any) -> None:
        path, text = getattr(_READING, "path", None), str(message).strip()
        if path is None:
            show_warning(message, category, *place, **keys)
        elif text not in told:
            told.add(text)
            log.warning("%s: %s (told of the first such file only)", path, text)

    logging.setLogRecordFactory(record)
    warnings.showwarning = warn
