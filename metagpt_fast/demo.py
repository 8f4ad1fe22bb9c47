"""``metagpt-fast demo``: makes a family of checkpoints, merges it, checks the result and shows it all."""

from __future__ import annotations

import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from .checkpoint import open_checkpoint
from .console import open_console
from .errors import DataError, OutputError
from .family import BASE_NAME, NAMES, PRESETS, TASK_VECTOR_SIGMAS, Family, family_nbytes, make_family
from .merging import merge
from .progress import open_progress
from .quantities import format_count, format_nbytes, format_rate, format_seconds
from .reference import merge_float64, round_from_float64, to_float64
from .tables import print_report
from .untrusted import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from .checkpoint import TensorSource
    from .report import MergeReport

MERGED_NAME = "merged"

_SEED = 20240617
_SAMPLE_NUMEL = 4096


def run_demo(folder: str | None = None, *, size: str = "demo", quiet: bool = False) -> None:
    """Run the demonstration and print it to stdout.

    Args:
        folder: where the family and the merged model stay; None makes a temporary folder and removes it.
        size: a name in ``family.PRESETS``.
        quiet: no progress.

    Raises:
        OutputError: ``folder`` has something in it, or cannot be made.
        DataError: the merged model is not what the formula says.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="metagpt-fast-demo-") as temporary:
            _show(Path(temporary), size, quiet)
        _print_next_steps(open_console(), "my-family", size, is_kept=False)
        return
    _check_folder(Path(folder))
    _show(Path(folder), size, quiet)
    _print_next_steps(open_console(), folder, size, is_kept=True)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = next(folder.iterdir(), None) is None
    except OSError as error:
        raise OutputError("cannot make the demo's folder", where=folder, got=error.strerror) from error
    if not is_empty:
        raise OutputError("the folder is not empty", where=folder, hint="choose a new one; the demo replaces nothing")


def _show(folder: Path, size: str, quiet: bool) -> None:
    console = open_console()
    family = _make(console, folder, size, quiet)

    _print_step(console, "2. Merge it")
    _print_commands(
        console,
        f"cd {shlex.quote(str(folder))}",
        f"metagpt-fast merge {' '.join((BASE_NAME, *NAMES))} -o {MERGED_NAME}",
    )
    with open_progress(quiet=quiet) as progress:
        report = merge(family.base, family.models, folder / MERGED_NAME, progress=progress)
    print_report(report, console)

    _print_step(console, "3. Check it")
    check = check_merge(family, report)
    console.print(f"   {check.numel:,} elements of {check.num_tensors} tensors against the formula in float64:")
    console.print(f"   {check.num_equal:,} are the same after rounding to the file's dtype,")
    console.print(f"   {check.numel - check.num_equal:,} lie on a border and were rounded to the value beside it")
    squares = [sigma**2 for sigma in TASK_VECTOR_SIGMAS]
    made_for = (f"{name} {square / sum(squares):.4f}" for name, square in zip(NAMES, squares, strict=True))
    console.print(f"   λ by construction, before rounding: {', '.join(made_for)}")
    console.print(f"   safetensors opens the result and finds {_count_tensors(report)} tensors")


def _make(console: Console, folder: Path, size: str, quiet: bool) -> Family:
    preset = PRESETS[size]
    _print_step(console, "1. Make a family: a Llama-shaped base and three fine-tunes, with random weights")
    started = time.perf_counter()
    with open_progress(quiet=quiet) as progress:
        nbytes = family_nbytes(preset.shape, len(NAMES))
        progress.start("make", nbytes)
        family = make_family(
            folder,
            shape=preset.shape,
            max_shard_nbytes=preset.max_shard_nbytes,
            seed=_SEED,
            advance=progress.advance,
        )
        progress.finish()
    seconds = time.perf_counter() - started
    console.print(
        f"   {', '.join((BASE_NAME, *NAMES))}: {format_count(family.num_parameters)} parameters, "
        f"{format_nbytes(family.nbytes)} in {family.num_shards} shards each"
    )
    console.print(f"   made in {format_seconds(seconds)}, {format_rate(nbytes, seconds)}")
    return family


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How many elements were sampled, and how many of them are exactly what the formula gives."""

    num_tensors: int
    numel: int
    num_equal: int


def check_merge(family: Family, report: MergeReport) -> MergeCheck:
    """Compare a sample of every merged tensor with ``θ₀ + Σ_t λ_t τ_t`` in float64.

    The kernels compute in float32 and round once, so an element may fall to the other side of a border
    between two values of the output's dtype; it may not be further off.

    Raises:
        DataError: an element is off by more than the rounding of its dtype.
    """
    base = open_checkpoint(family.base)
    models = [open_checkpoint(path) for path in family.models]
    merged = open_checkpoint(report.out)
    random = np.random.default_rng(_SEED)
    numel = num_equal = 0
    for name, out in merged.tensors.items():
        start = int(random.integers(max(1, out.numel - _SAMPLE_NUMEL + 1)))
        operands = [(_read(source.tensors[name], start), out.dtype) for source in (base, *models)]
        raw = _read(out, start)
        [exact] = merge_float64([operands], report.coefficients[:1], has_base=True)
        expected = to_float64(round_from_float64(exact, out.dtype), out.dtype)
        got = to_float64(raw, out.dtype)
        difference = np.abs(got - expected)
        # One unit in the last place of bf16 is at most 2^-7 of the value; float32 adds 2^-20 of the operands.
        allowed = 2.0**-7 * np.abs(exact) + 2.0**-20 * np.abs(to_float64(*operands[0]))
        if not np.all(difference <= allowed):
            raise DataError(
                f"tensor {name!r} of the merged model is wrong",
                where=out.path,
                got=f"a difference of {difference.max():.3g}",
                expected="the formula, rounded to the output's dtype",
                hint="please report this with the output of `metagpt-fast info`",
            )
        numel += got.size
        num_equal += int(np.count_nonzero(difference == 0))
    return MergeCheck(len(merged.tensors), numel, num_equal)


def _read(source: TensorSource, start: int) -> NDArray[np.uint8]:
    """Return the bytes of at most ``_SAMPLE_NUMEL`` elements of a tensor, from element ``start`` on."""
    itemsize = source.dtype.itemsize
    numel = min(_SAMPLE_NUMEL, source.numel - start)
    return np.fromfile(source.path, np.uint8, numel * itemsize, offset=source.data_offset + start * itemsize)


def _count_tensors(report: MergeReport) -> int:
    """Open every shard with the safetensors package and count what it finds."""
    from safetensors import safe_open

    num_tensors = 0
    for shard in report.shards:
        with safe_open(report.out / shard, framework="numpy") as file:
            num_tensors += sum(file.get_slice(name).get_shape() is not None for name in file.keys())  # noqa: SIM118
    return num_tensors


def _print_step(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_commands(console: Console, *commands: str) -> None:
    """Print commands that work as they stand, in lines that are never cut."""
    for command in commands:
        console.print(f"   $ {printable(command)}", soft_wrap=True)


def _print_next_steps(console: Console, folder: str, size: str, *, is_kept: bool) -> None:
    where = f"kept in {printable(folder)}" if is_kept else "removed; give a folder to keep it"
    _print_step(console, f"What to try next (the family is {where})")
    quoted = shlex.quote(folder)
    _print_commands(
        console,
        f"cd {quoted}" if is_kept else f"metagpt-fast demo {quoted} --size {size} && cd {quoted}",
        f"metagpt-fast measure {' '.join((BASE_NAME, *NAMES))}",
        f"metagpt-fast merge {' '.join((BASE_NAME, *NAMES))} -o by-layer --granularity layer",
        "metagpt-fast merge --help",
    )
