"""The order of the measurement, and its result."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _native, info
from ..errors import OutputError, RecipeError
from ..family import Family, family_nbytes
from ..output_target import free_nbytes, os_errors
from ..page_cache import evict, percent_cached
from ..progress import Progress
from ..quantities import format_nbytes
from .bus import find_bus
from .files import write_beside, write_seconds
from .memory import MemoryRates, measure_memory, numel_for, round_nbytes
from .pass_progress import PassProgress
from .prediction import Prediction, fits_in_cache, predict
from .rates import Rates, sharing_of
from .reading import read_as_merge
from .trial import Check, check_predictions, make_files, start_seconds, warnings_of, weights_of
from .work import GRANULARITIES, MODELS, NUM_MODELS, shape_of_size, work_of

DEFAULT_SIZE = "2GB"
MIN_NBYTES = 4 << 20
DISK_SECONDS = 90.0
"""What reading and writing may take, about: the files are made smaller for a slow disk."""

# In sizes of the family: written (⅜), made, read, read beside a write (3), twice read and eight times merged (4).
_NUM_DISK_PASSES = 7.5
_SPACE_FACTOR = 1.3  # the family, one merged model, and a little
_MAX_PERCENT_CACHED = 1.0
_NUM_WRITES = 3
_NUM_COLD_READS = 3
_SHORT_SECONDS = 2.0  # what writing the files takes, where reading them more than once is no loss
_NUM_WARM_READS = 3


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a merge of models of a known size will take.

    Attributes:
        model: ``7 B``.
        num_parameters: of one model.
        nbytes_in: of base and models.
        granularity: ``model`` or ``layer``.
        device: ``cpu``, or the GPU's name.
        cold: with no input in the page cache.
        warm: with all of them in it; None if they do not fit.
    """

    model: str
    num_parameters: int
    nbytes_in: int
    granularity: str
    device: str
    cold: Prediction
    warm: Prediction | None


@dataclass(frozen=True)
class BenchResult:
    """What was measured in a folder, and what follows from it.

    Attributes:
        folder: where the files were.
        files_nbytes: of base and models of the family that was made.
        isa, num_threads: of the kernels.
        cache_nbytes: memory that the page cache can have.
        rates: the machine's.
        gpu: its name, or why none was measured.
        is_cold: whether the files could be taken out of the page cache; if not, ``disk_read`` is no disk's.
        checks: merges of the family.
        forecasts: by model, device and granularity.
        warnings: sentences for the user.
    """

    folder: Path
    files_nbytes: int
    isa: str
    num_threads: int
    cache_nbytes: int
    rates: Rates
    gpu: str
    is_cold: bool
    checks: tuple[Check, ...]
    forecasts: tuple[Forecast, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; rates are bytes per second, times seconds."""
        result = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        result |= {"folder": str(self.folder), "rates": dataclasses.asdict(self.rates)}
        result["checks"] = [
            {**dataclasses.asdict(check), "ratio": check.ratio, "is_close": check.is_close} for check in self.checks
        ]
        result["forecasts"] = [
            {**dataclasses.asdict(each), "bottleneck": each.cold.bottleneck} for each in self.forecasts
        ]
        return result


def run_bench(folder: Path, size_nbytes: int, progress: Progress) -> BenchResult:
    """Measure this machine, and the disk of ``folder``; what is made there is removed, whatever happens.

    Args:
        folder: an existing one.
        size_nbytes: most bytes of the family that is made; less for a slow disk or a small memory.
        progress: gets a phase per measurement.

    Raises:
        RecipeError: the size is too small.
        OutputError: the folder is not there or cannot be written, or the disk is too small.
    """
    check_folder(folder, size_nbytes)
    facts = info.collect()["machine"]
    cache_nbytes = min(facts["memory_available_nbytes"] or 4 << 30, facts["cgroup_memory_limit_nbytes"] or 2**63)
    with (
        os_errors(folder, "cannot measure the disk"),
        tempfile.TemporaryDirectory(prefix=".metagpt-fast-bench-", dir=folder) as name,
    ):
        return _measure(folder, Path(name), size_nbytes, cache_nbytes, progress)


def check_folder(folder: Path, size_nbytes: int) -> None:
    """Refuse a folder or a size that cannot be used; raises as :func:`run_bench`."""
    if size_nbytes < MIN_NBYTES:
        raise RecipeError(
            "too small to measure with", where="size", got=format_nbytes(size_nbytes), expected=f"{MIN_NBYTES} or more"
        )
    if not folder.is_dir():
        raise OutputError(
            "the folder is not there" if not folder.exists() else "this is no folder",
            where=folder,
            expected="a folder on the disk that you will merge on",
        )
    needed = int(_SPACE_FACTOR * size_nbytes)
    with os_errors(folder, "cannot measure the disk"):
        free = free_nbytes(folder)
    if free is not None and free < needed:
        raise OutputError(
            "too little free space to measure the disk",
            where=folder,
            got=f"{format_nbytes(free)} free",
            expected=f"{format_nbytes(needed)} for a while",
            hint="give a smaller --size, or another folder",
        )


def files_nbytes(size_nbytes: int, disk_write: float, cache_nbytes: int) -> int:
    """Return the size of the family: what was asked for, or what ``DISK_SECONDS`` or half of the memory allow."""
    affordable = int(disk_write * DISK_SECONDS / _NUM_DISK_PASSES)
    return max(MIN_NBYTES, min(size_nbytes, affordable, int(cache_nbytes / 2 / _SPACE_FACTOR)))


def forecasts_of(rates: Rates, cache_nbytes: int) -> list[Forecast]:
    """Return what merges of real models will take, on the CPU, and on a GPU if the bus of one was measured."""
    forecasts = []
    for model, shape in MODELS.items():
        for device in ("cpu", *([rates.bus.name] if rates.bus else [])):
            for granularity in GRANULARITIES:
                work, on_gpu = work_of(shape, granularity), device != "cpu"
                cold = predict(work, rates, cache_nbytes, on_gpu=on_gpu)
                warm = None
                if fits_in_cache(work, cache_nbytes):
                    warm = predict(work, rates, cache_nbytes, is_warm=True, on_gpu=on_gpu)
                numel = family_nbytes(shape, 0) // 2
                forecasts.append(Forecast(model, numel, work.nbytes_in, granularity, device, cold, warm))
    return forecasts


def _measure(folder: Path, scratch: Path, size_nbytes: int, cache_nbytes: int, progress: Progress) -> BenchResult:
    memory = _measure_memory(cache_nbytes, progress)
    bus, why_no_gpu = find_bus()
    cache_write, disk_write = _measure_writing(scratch / "written", size_nbytes // (1 + NUM_MODELS) // 2, progress)
    shape = shape_of_size(files_nbytes(size_nbytes, disk_write, cache_nbytes) // (1 + NUM_MODELS))
    nbytes = family_nbytes(shape, NUM_MODELS)
    progress.start("make files", nbytes)
    family = make_files(scratch / "family", shape, progress.advance)
    progress.finish()

    disk_read, is_cold = _measure_disk_read(family, nbytes, nbytes / disk_write, progress)
    cache_read = _measure_cache_read(family, nbytes, progress)
    sharing = _measure_sharing(family, nbytes // (1 + NUM_MODELS), scratch / "written", disk_read, disk_write, progress)
    rates = Rates(
        memory.memory_read,
        memory.memory_triad,
        memory.layer_gram,
        memory.layer_merge,
        disk_read,
        cache_read,
        cache_write,
        disk_write,
        sharing,
        start_seconds(scratch / "tiny"),
        bus,
    )
    checks = check_predictions(family, shape, rates, cache_nbytes, scratch / "merged", progress)
    warnings = warnings_of(checks)
    if not is_cold:
        warnings.insert(0, _no_disk(folder))
    return BenchResult(
        folder=folder,
        files_nbytes=nbytes,
        isa=_native.isa(),
        num_threads=_native.num_threads(),
        cache_nbytes=cache_nbytes,
        rates=rates,
        gpu=bus.name if bus else why_no_gpu,
        is_cold=is_cold,
        checks=tuple(checks),
        forecasts=tuple(forecasts_of(rates, cache_nbytes)),
        warnings=tuple(warnings),
    )


def _measure_memory(cache_nbytes: int, progress: Progress) -> MemoryRates:
    numel = numel_for(cache_nbytes)
    progress.start("memory, kernels", round_nbytes(numel))
    rates = measure_memory(numel, progress.advance)
    progress.finish()
    return rates


def _measure_writing(path: Path, nbytes: int, progress: Progress) -> tuple[float, float]:
    """Return bytes per second into the page cache, and until they are on the disk."""
    progress.start("write", _NUM_WRITES * nbytes)
    seconds = [write_seconds(path, nbytes, progress.advance) for _ in range(_NUM_WRITES)]
    progress.finish()
    in_cache, on_disk = (nbytes / statistics.median(each) for each in zip(*seconds, strict=True))
    return in_cache, on_disk


def _measure_disk_read(family: Family, nbytes: int, about_seconds: float, progress: Progress) -> tuple[float, bool]:
    """Return bytes per second, and whether they came from the disk; leaves the files in the page cache."""
    files, num_rounds = weights_of(family), _NUM_COLD_READS if about_seconds < _SHORT_SECONDS else 1
    progress.start("read", num_rounds * nbytes)
    seconds, percents = [], []
    for _ in range(num_rounds):
        evict(files)
        percents.append(percent_cached(files))
        seconds.append(_read_seconds(family.base, family.models, progress.advance))
    progress.finish()
    return nbytes / statistics.median(seconds), max(percents) <= _MAX_PERCENT_CACHED


def _measure_cache_read(family: Family, nbytes: int, progress: Progress) -> float:
    progress.start("read again", _NUM_WARM_READS * nbytes)
    seconds = [_read_seconds(family.base, family.models, progress.advance) for _ in range(_NUM_WARM_READS)]
    progress.finish()
    return nbytes / statistics.median(seconds)


def _measure_sharing(
    family: Family, model_nbytes: int, target: Path, disk_read: float, disk_write: float, progress: Progress
) -> float:
    """Write a model's size while others are read: as many of them as take about as long."""
    num_read = min(1 + NUM_MODELS, max(2, round(disk_read / disk_write)))
    models, read_nbytes = family.models[: num_read - 1], num_read * model_nbytes
    evict(weights_of(family))
    progress.start("read and write", read_nbytes + model_nbytes)
    both = write_beside(
        lambda advance: _read_seconds(family.base, models, advance), target, model_nbytes, progress.advance
    )
    progress.finish()
    return sharing_of(read_nbytes / disk_read, model_nbytes / disk_write, both)


def _read_seconds(base: Path, models: Sequence[Path], advance: Callable[[int], None]) -> float:
    started = time.perf_counter()
    read_as_merge(base, models, PassProgress(advance))
    return time.perf_counter() - started


def _no_disk(folder: Path) -> str:
    return (
        f"the files in {folder} stay in memory, whatever is done to take them out: the speed of reading is not that of "
        "a disk. Give a folder on the disk that you will merge on"
    )
