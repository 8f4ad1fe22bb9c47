"""Writing the page: whole or not at all, and never over a file that is something else."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, OutputError
from ..untrusted import open_regular, read_at
from .document import measurement_page
from .elements import GENERATOR

if TYPE_CHECKING:
    from ..measurement import Measurement
    from ..report import MergeReport


def save_page(measurement: Measurement, path: str | Path, *, report: MergeReport | None = None) -> None:
    """Write :func:`measurement_page` to a file.

    Args:
        measurement: what to show.
        path: the file; one that is there is replaced if it is such a page, or empty.
        report: the merge that the measurement was made or used for, if there was one.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    check_page_path(path)
    content = measurement_page(measurement, report)
    staging = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        staging.write_text(content, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write the page ({error.strerror})", where=path) from error
    finally:
        staging.unlink(missing_ok=True)


def check_page_path(path: str | Path, *, new_folder: str | Path | None = None) -> None:
    """Raise OutputError unless a page can be written under this name.

    Args:
        path: the file.
        new_folder: a folder that will have been made by then: the output of a merge.
    """
    path = Path(path)
    folder = path.parent
    if new_folder is not None and folder.resolve() == Path(new_folder).resolve():
        return
    if path.is_dir():
        problem, hint = "it is a folder", "give the name of a file"
    elif not folder.is_dir():
        problem, hint = f"there is no folder {folder}", "make the folder first"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem, hint = f"no permission to write in {folder}", "choose another place"
    elif os.path.lexists(path) and not _may_be_replaced(path):
        problem, hint = "it exists and is not a page of metagpt-fast", "choose another name"
    else:
        return
    raise OutputError(f"cannot write the page ({problem})", where=path, hint=hint)


def _may_be_replaced(path: Path) -> bool:
    try:
        with open_regular(path) as (fd, info):
            return info.st_size == 0 or GENERATOR.encode() in read_at(fd, 256, 0)
    except CheckpointError:
        return False
