"""Where the output may go: every refusal before work starts, and the renames that put it in its place."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .build_folder import BuildFolder, build_path, nbytes_allocated, was_publishing
from .errors import OutputError
from .quantities import format_nbytes

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Folders that a model folder may hold; any other says that it holds more than a model.
_KNOWN_SUBFOLDERS = frozenset({".cache", "additional_chat_templates"})
_HINTS = {
    errno.ENOSPC: "free some space or choose another disk for the output",
    errno.EDQUOT: "free some of your quota or choose another disk for the output",
    errno.EMFILE: "choose a larger --max-shard-size, so that there are fewer files, or raise ulimit -n",
    errno.EFBIG: "this file system has no files of that size; choose a smaller --max-shard-size",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def os_errors(where: Path, what: str) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError about ``where``."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0)
        raise OutputError(f"{what} ({error.strerror or error})", where=where, hint=hint) from error


def is_file_target(target: Path) -> bool:
    """Whether the output is one bare safetensors file instead of a folder."""
    return target.name.endswith(".safetensors")


def side_file(target: Path, name: str) -> Path:
    """Return where the extra file ``name`` of the bare file ``target`` lies: ``merged.metagpt_fast.json``."""
    return target.with_name(f"{target.stem}.{name}")


def real_target(target: Path) -> Path:
    """Return the absolute path that is written; a link to a folder is followed, a link to a file replaced."""
    if target.is_dir():
        return Path(os.path.realpath(target))
    return Path(os.path.realpath(target.parent)) / target.name


def free_nbytes(folder: Path) -> int | None:
    """Return the bytes that may still be written in ``folder``; None where the file system does not say."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None


def check_target(target: Path, *, nbytes_needed: int, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that cannot, or must not, be written.

    Args:
        target: the output folder, or the output file where the name ends in ``.safetensors``.
        nbytes_needed: bytes of all output shards.
        inputs: folders and files of the base and the models, as given.
        overwrite: whether a model that is already there may be replaced.

    Raises:
        OutputError: the target is, contains or lies inside an input; its folder is missing or not writable;
            it exists and may not be replaced; there is too little free space.
    """
    with os_errors(target, "cannot use this output"):
        real = real_target(target)
        _check_apart_from_inputs(real, inputs)
        _check_parent(real)
        check_replaceable(real, overwrite=overwrite, is_publishing=is_file_target(real) and was_publishing(real))
        _check_space(real, nbytes_needed)


def check_replaceable(target: Path, *, overwrite: bool, is_publishing: bool = False) -> None:
    """Refuse a target, as ``real_target`` returns it, that exists and is not to be replaced.

    Without ``overwrite`` only an empty folder may be there. With it also a folder that looks like a model and
    like nothing else: what is replaced is deleted, and a mistyped path must not cost the user other files.
    ``is_publishing``: an interrupted merge may have put the first file of this output in its place already.
    """
    if is_file_target(target):
        _check_file(target, overwrite)
        _check_file(side_file(target, "metagpt_fast.json"), overwrite or is_publishing)
    elif target.is_dir():
        _check_folder(target, overwrite)
    elif _exists(target):
        raise OutputError(
            "the output is an existing file",
            where=target,
            expected="a new folder, or the name of a file that ends in .safetensors",
        )


def publish_folder(build: BuildFolder, target: Path, *, overwrite: bool) -> None:
    """Rename the finished folder to ``target``; an old output takes its place, and is deleted with it."""
    check_replaceable(target, overwrite=overwrite)
    with os_errors(target, "cannot move the finished output to its place"):
        if not target.is_dir():
            build.files.rename(target)
            return
        shutil.copymode(target, build.files)
        if not any(target.iterdir()):
            build.files.rename(target)
            return
        if _exchange(build.files, target):
            return
        try:
            target.rename(build.replaced)
            build.files.rename(target)
        finally:
            # Also after Ctrl-C, which may come on either side of both renames.
            if not target.exists():
                build.replaced.rename(target)


def publish_file(build: BuildFolder, target: Path, *, overwrite: bool) -> None:
    """Move every file to its place beside ``target``. At no moment is a record beside weights of another merge."""
    check_replaceable(target, overwrite=overwrite, is_publishing=True)
    with os_errors(target, "cannot move the finished output to its place"):
        if _exists(target):
            _replace_file(build, target)
            return
        moved: list[Path] = []
        try:
            # The weights last: while they are not there, there is no output.
            for path in sorted(build.files.iterdir(), key=lambda path: path.name == target.name):
                path.replace(target.with_name(path.name))
                moved.append(path)
        except BaseException:
            for path in moved:
                with suppress(OSError):
                    target.with_name(path.name).replace(path)
            raise


def restore_record(build: BuildFolder, target: Path) -> None:
    """Bring back what ``publish_file`` has put aside of an output that it did not replace."""
    if build.replaced_record.is_dir():
        for path in build.replaced_record.iterdir():
            path.replace(target.with_name(path.name))
        build.replaced_record.rmdir()


def _replace_file(build: BuildFolder, target: Path) -> None:
    """Put the old record aside, then replace the weights, then bring the new record."""
    new = build.files / target.name
    side_files = [path for path in build.files.iterdir() if path != new]
    identity = _identity(new)
    build.replaced_record.mkdir(exist_ok=True)
    try:
        for path in side_files:
            with suppress(FileNotFoundError):
                target.with_name(path.name).replace(build.replaced_record / path.name)
        if not _exchange(new, target):
            new.replace(target)
        for path in side_files:
            path.replace(target.with_name(path.name))
    except BaseException:
        # Where names cannot be exchanged, the old weights are gone by now, and the new ones stay without a record.
        if _identity(target) != identity or (new.exists() and _exchange(new, target)):
            restore_record(build, target)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders swap their names in one step; returns whether the system can."""
    import ctypes  # not at the top: most merges replace nothing

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
        return False
    raise OSError(code, os.strerror(code))


def _check_apart_from_inputs(target: Path, inputs: Sequence[Path]) -> None:
    """Inputs are never written, so nothing of them may be the target, above it or below it."""
    around_target = {_identity(path) for path in (target, *target.parents)}
    target_identity = _identity(target)
    for path in inputs:
        for protected in _real_places(Path(path)):
            identity = _identity(protected)
            if identity is None:
                continue
            if identity == target_identity:
                problem = "the output is one of the inputs"
            elif identity in around_target:
                problem = "the output lies inside an input"
            elif target_identity in {_identity(parent) for parent in protected.parents}:
                problem = "the output contains an input"
            else:
                continue
            raise OutputError(
                problem,
                where=target,
                got=path,
                expected="a place outside all inputs, which are never written",
                hint="choose another output",
            )


def _real_places(path: Path) -> list[Path]:
    """Return where an input really lies: its own place, and where the links in its folder point."""
    places = [Path(os.path.realpath(path))]
    if path.is_dir():
        places += [Path(os.path.realpath(entry)) for entry in path.iterdir() if entry.is_symlink()]
    return places


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: the same for one place reached by several paths, bind mounts included."""
    try:
        stats = path.stat()
    except OSError:
        return None
    return stats.st_dev, stats.st_ino


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not _exists(parent):
        raise OutputError(
            "the folder of the output does not exist",
            where=parent,
            hint=f"make it with: mkdir -p {shlex.quote(str(parent))}",
        )
    if not parent.is_dir():
        raise OutputError("the output lies under a file", where=target, got=f"the file {parent}")
    if os.access(parent, os.W_OK | os.X_OK):
        return
    read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
    raise OutputError(
        "the folder of the output is not writable",
        where=parent,
        got="a read-only file system" if read_only else "no write permission",
        hint="choose another output",
    )


def _check_space(target: Path, nbytes_needed: int) -> None:
    free = free_nbytes(target.parent)
    if free is None:
        return
    free += nbytes_allocated(build_path(target))  # of an interrupted merge, which is continued or deleted
    if free >= nbytes_needed:
        return
    hint = "free some space or choose another disk for the output"
    if _exists(target) and (is_file_target(target) or any(target.iterdir())):
        hint += "; the old output does not count as free, because it is deleted only after the new one is whole"
    raise OutputError(
        "too little free space for the output",
        where=target.parent,
        got=f"{format_nbytes(free)} free",
        expected=f"{format_nbytes(nbytes_needed)} ({nbytes_needed - free:,} bytes more)",
        hint=hint,
    )


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError("the output file is an existing folder", where=path, expected="the name of a file")
    if _exists(path) and not overwrite:
        raise OutputError("the output exists", where=path, hint="replace it with --overwrite, or choose another name")


def _check_folder(folder: Path, overwrite: bool) -> None:
    _check_not_special(folder)
    names = {entry.name: entry.is_dir() for entry in folder.iterdir()}
    if not names:
        return
    if not overwrite:
        raise OutputError(
            "the output folder exists and is not empty",
            where=folder,
            hint="replace it with --overwrite, or choose another name",
        )
    hint = "delete it yourself if you mean it, or choose another output"
    looks_like_model = "metagpt_fast.json" in names or (
        "config.json" in names and any(name.endswith(".safetensors") for name in names)
    )
    if not looks_like_model:
        raise OutputError(
            "this folder does not look like a model, so it is not overwritten",
            where=folder,
            expected="metagpt_fast.json, or config.json and safetensors files",
            hint=hint,
        )
    subfolders = sorted(n for n, is_dir in names.items() if is_dir and n not in _KNOWN_SUBFOLDERS)
    if subfolders:
        raise OutputError(
            "this folder holds more than a model, so it is not overwritten",
            where=folder,
            got=f"the folder {subfolders[0]} in it",
            hint=hint,
        )


def _check_not_special(folder: Path) -> None:
    """A folder that is in use as a place cannot be swapped by a rename, empty or not."""
    if folder.is_mount():
        problem = "the output is a mount point, which cannot be replaced"
    elif folder in (current := Path(os.path.realpath("."))).parents or folder == current:
        problem = "the output is, or contains, the current folder"
    elif folder in (home := _home()).parents or folder == home:
        problem = "the output is, or contains, your home folder"
    else:
        return
    raise OutputError(problem, where=folder, hint=f"name a new folder, such as {folder / 'merged'}")


def _home() -> Path:
    # Path.home() raises for a user without a home folder (a container's arbitrary user id); this returns "~".
    return Path(os.path.realpath(os.path.expanduser("~")))  # noqa: PTH111


def _exists(path: Path) -> bool:
    """Whether something has this name, a link that leads nowhere included."""
    return path.exists() or path.is_symlink()
