"""Merges a small family, to check what was predicted for it."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..family import PRESETS, Family, LlamaShape, make_family
from ..merging import merge
from ..page_cache import evict
from ..progress import Progress
from .pass_progress import PassProgress
from .prediction import Prediction, fits_in_cache, predict
from .rates import Rates
from .work import GRANULARITIES, work_of

MAX_RATIO = 1.5
"""What a merge may take of the predicted time, or the predicted time of it, without a warning."""

_NUM_STARTS = 3
_NUM_WARM = 3  # they are short; the median counts
_SEED = 20240617


@dataclass(frozen=True, slots=True)
class Check:
    """One merge of the small family, and what was predicted.

    Attributes:
        granularity: ``model`` or ``layer``.
        is_warm: whether the inputs were in the page cache.
        predicted: for these sizes.
        seconds: measured.
    """

    granularity: str
    is_warm: bool
    predicted: Prediction
    seconds: float

    @property
    def ratio(self) -> float:
        """Return the measured time by the predicted one."""
        return self.seconds / self.predicted.seconds

    @property
    def is_close(self) -> bool:
        """Return whether the prediction held."""
        return 1 / MAX_RATIO <= self.ratio <= MAX_RATIO


def make_files(folder: Path, shape: LlamaShape, advance: Callable[[int], None]) -> Family:
    """Make a base and three models in ``folder``; raises OutputError."""
    return make_family(folder, shape=shape, max_shard_nbytes=2**63 - 1, seed=_SEED, advance=advance)


def weights_of(family: Family) -> list[Path]:
    """Return the safetensors files, base first."""
    return [path for folder in (family.base, *family.models) for path in sorted(folder.glob("*.safetensors"))]


def start_seconds(folder: Path) -> float:
    """Return what a merge of next to nothing takes: planning, waiting for the disk, giving the output its name."""
    family = make_files(folder, PRESETS["tiny"].shape, lambda nbytes: None)
    seconds = [_merge(family, folder / "merged", "layer", Progress()) for _ in range(1 + _NUM_STARTS)]
    shutil.rmtree(folder)
    return statistics.median(seconds[1:])  # the first one imports what it needs


def check_predictions(
    family: Family, shape: LlamaShape, rates: Rates, cache_nbytes: int, out: Path, progress: Progress
) -> list[Check]:
    """Merge the family by model and by layer, with its files out of the page cache and in it.

    Args:
        family: in files of one file system.
        shape: that of its models.
        rates: the machine's.
        cache_nbytes: memory that the page cache can have.
        out: where the merged models are written, one after the other, and removed.
        progress: gets a phase per granularity.

    Raises:
        OutputError: the disk is full.
    """
    files, checks = weights_of(family), []
    for granularity in GRANULARITIES:
        work = work_of(shape, granularity)
        num_warm = _NUM_WARM if fits_in_cache(work, cache_nbytes) else 0
        progress.start(f"merge by {granularity}", 2 * (1 + num_warm) * work.nbytes_in)
        inner = PassProgress(progress.advance)
        evict(files)
        seconds = [_merge(family, out, granularity, inner)]
        checks.append(Check(granularity, False, predict(work, rates, cache_nbytes), seconds[0]))
        if num_warm:
            warm = statistics.median(_merge(family, out, granularity, inner) for _ in range(num_warm))
            checks.append(Check(granularity, True, predict(work, rates, cache_nbytes, is_warm=True), warm))
        progress.finish()
    return checks


def warnings_of(checks: Sequence[Check]) -> list[str]:
    """Return a sentence about the predictions that did not hold, if there are any."""
    far = [check for check in checks if not check.is_close]
    if not far:
        return []
    times = ", ".join(
        f"{check.ratio:.2f} ({check.granularity}, {'cached' if check.is_warm else 'on the disk'})" for check in far
    )
    return [
        f"merges of the small family took other times than predicted: {times} times as long. The times predicted for "
        "large models are as uncertain. Is something else at work on this machine or disk? If not, try a larger --size"
    ]


def _merge(family: Family, out: Path, granularity: str, progress: Progress) -> float:
    started = time.perf_counter()
    merge(family.base, family.models, out, granularity=granularity, progress=progress)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds
