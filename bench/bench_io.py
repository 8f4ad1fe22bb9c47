"""Reading and writing files, way by way, against the machine's own speed; and what ``--io auto`` makes of it.

    pytest bench/bench_io.py [--io-folder DIR] [--io-size 1GB] [--io-rounds 5]

Files are those of a family, base and three models. Each round follows one of its ceiling. With the files in the page
cache that is memory: reading it, or the triad for what is written. Without it is the disk: the same files, or a new
one, by eight threads past the page cache (O_DIRECT) and by one thread in order, whichever is faster. A way can pass
100 %: other numbers of transfers at a time may be better still, and a triad reads more than it writes.

Reads of ``auto``, ``mmap`` and ``pread`` are what ``metagpt-fast measure --io`` does: prefetch, kernels and all. The
others only bring the bytes to the threads.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchlib.file_ways import CEILING_THREADS, Target, read_buffers, read_direct, read_mapped, supports_direct
from benchlib.page_cache import CacheState
from benchlib.rows import Row, Spread, save_rows
from numpy.typing import NDArray

from metagpt_fast import _native
from metagpt_fast.benchmarking.trial import make_files, weights_of
from metagpt_fast.benchmarking.work import NUM_MODELS, shape_of_size
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.family import Family
from metagpt_fast.input_files import IO_CHOICES, InputFiles
from metagpt_fast.merging import measure
from metagpt_fast.page_cache import evict, fill
from metagpt_fast.quantities import parse_nbytes

_MAX_PERCENT_CACHED_WHEN_COLD = 1.0
_PAGE_NBYTES = 4096
_MEMORY_NBYTES = 128 << 20  # of each of the three arrays that the ceilings in memory go over

_READ_CASES = [
    *(("read", way, cache) for way in ("map", "pread", "direct") for cache in ("warm", "cold")),
    *(("measure", f"--io {io}", cache) for io in IO_CHOICES for cache in ("warm", "cold")),
]
_WRITE_CASES = [("write", way, cache) for way in ("buffered", "mapped", "direct") for cache in ("cache", "disk")]
# O_DIRECT knows no page cache.
_IMPOSSIBLE = {("read", "direct", "warm"), ("write", "direct", "cache")}
CASES = [case for case in (*_READ_CASES, *_WRITE_CASES) if case not in _IMPOSSIBLE]

_rows: list[Row] = []


@dataclass(frozen=True)
class Bench:
    """The files, and what their ceilings need.

    Attributes:
        folder: scratch, on the files' file system.
        family: base and three models.
        paths: their weights.
        cache: their state in the page cache.
        nbytes: of the weights.
        has_direct: whether the file system knows O_DIRECT.
    """

    folder: Path
    family: Family
    paths: list[Path]
    cache: CacheState
    nbytes: int
    has_direct: bool

    @property
    def write_nbytes(self) -> int:
        """Return the bytes of a file that is written: a model's, in whole pages."""
        return self.nbytes // (1 + NUM_MODELS) // _PAGE_NBYTES * _PAGE_NBYTES

    def read(self, action: str, way: str) -> None:
        """Read all files."""
        if action == "measure":
            measure(self.family.base, self.family.models, io=way.removeprefix("--io "))
        elif way == "map":
            read_mapped(self.paths)
        elif way == "pread":
            read_buffers(self.paths, _native.num_threads())
        else:
            read_direct(self.paths, _native.num_threads())

    def auto_choice(self) -> str:
        """Return what ``--io auto`` is for these files."""
        folders = (self.family.base, *self.family.models)
        return InputFiles([shard for folder in folders for shard in open_checkpoint(folder).shards]).io


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Make the files, and remove them."""
    config = request.config
    folder = Path(tempfile.mkdtemp(prefix="metagpt-fast-bench-", dir=config.getoption("io_folder")))
    try:
        shape = shape_of_size(parse_nbytes(config.getoption("io_size")) // (1 + NUM_MODELS))
        family = make_files(folder, shape, lambda nbytes: None)
        paths = weights_of(family)
        evict(paths)
        nbytes = sum(path.stat().st_size for path in paths)
        yield Bench(folder, family, paths, CacheState(paths), nbytes, supports_direct(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _save_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if path := request.config.getoption("rows"):
        save_rows(_rows, path)


@pytest.mark.parametrize(("action", "way", "cache"), CASES, ids=[" ".join(case) for case in CASES])
def test_io(benchmark: Any, bench: Bench, request: pytest.FixtureRequest, action: str, way: str, cache: str) -> None:
    is_disk = cache in {"cold", "disk"}
    if is_disk and not bench.has_direct:
        pytest.skip("the file system has no O_DIRECT, and the disk's speed cannot be measured")
    rounds = request.config.getoption("io_rounds")
    run_once = _write_once if action == "write" else _read_once
    nbytes = bench.write_nbytes if action == "write" else bench.nbytes
    ceiling = _ceiling(bench, action, is_disk=is_disk)
    ceilings: list[float] = []
    bench.cache.percents.clear()
    if cache == "warm":
        evict(bench.paths)  # one known state: files that were read in order, see bench_merge
    with ExitStack() as stack:

        def setup() -> tuple[tuple[Callable[[], object]], dict[str, object]]:
            stack.close()  # removes the file of the round before
            ceilings.append(ceiling.measure() / 1e9)
            os.sync()
            return (run_once(bench, stack, action, way, cache),), {}

        benchmark.pedantic(lambda call: call(), setup=setup, rounds=rounds, warmup_rounds=0 if is_disk else 1)
    seconds = benchmark.stats.stats.data
    rates = [nbytes / s / 1e9 for s in seconds]
    ceilings = ceilings[-len(seconds) :]  # the warm-up's comes first
    metrics = {
        "seconds": Spread.of(seconds),
        "gb_per_s": Spread.of(rates),
        "ceiling_gb_per_s": Spread.of(ceilings),
        "percent_of_ceiling": Spread.of([100 * r / c for r, c in zip(rates, ceilings, strict=True)]),
    }
    if bench.cache.percents:
        metrics["percent_cached"] = Spread.of(bench.cache.percents)
    parameters = {
        "action": action,
        "way": way,
        "cache": cache,
        "ceiling": ceiling.name,
        "threads": _native.num_threads(),
    }
    if action == "measure":
        parameters["io"] = bench.auto_choice() if way == "--io auto" else way.removeprefix("--io ")
    formula = "bytes of the file, once" if action == "write" else "bytes of base and models, once"
    row = Row("io", f"{action} {way}, {cache}", parameters, metrics, formula=formula, nbytes=nbytes)
    benchmark.extra_info.update(row.to_dict())
    _rows.append(row)


def _read_once(bench: Bench, _: ExitStack, action: str, way: str, cache: str) -> Callable[[], object]:
    """Bring the files into the state that is wanted, and return what reads them."""
    if cache == "warm":
        bench.cache.warm_up()
        if not bench.cache.is_warm:
            pytest.skip("the files do not fit the page cache")
    else:
        bench.cache.cool_down()
        if bench.cache.percents[-1] > _MAX_PERCENT_CACHED_WHEN_COLD:
            pytest.skip("the files stay in the page cache")
    return lambda: bench.read(action, way)


def _write_once(bench: Bench, stack: ExitStack, action: str, way: str, cache: str) -> Callable[[], object]:
    """Make a file, and return what fills it."""
    target = Target(way, bench.folder / "written", bench.write_nbytes, _native.num_threads())
    fill_it = stack.enter_context(target.ready())
    return lambda: fill_it(cache == "disk")


@dataclass(frozen=True)
class Ceiling:
    """What ways are compared with: the fastest of ``calls``, each of which moves ``nbytes`` after ``prepare``."""

    name: str
    calls: Sequence[Callable[[], object]]
    nbytes: int
    prepare: Callable[[], object] = os.sync

    def measure(self) -> float:
        """Return bytes per second."""
        return self.nbytes / min(map(self._seconds, self.calls))

    def _seconds(self, call: Callable[[], object]) -> float:
        self.prepare()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def _ceiling(bench: Bench, action: str, *, is_disk: bool) -> Ceiling:
    if is_disk and action == "write":
        ways = (("direct", CEILING_THREADS), ("buffered", 1))
        calls = [functools.partial(_write_file, bench, *each) for each in ways]
        return Ceiling("file write", calls, bench.write_nbytes)
    if is_disk:
        calls = [lambda: read_direct(bench.paths, CEILING_THREADS), lambda: fill(bench.paths)]
        return Ceiling("file read", calls, bench.nbytes, prepare=lambda: evict(bench.paths))
    memory = _memory()
    a, b, c = (memory[i * _MEMORY_NBYTES :].ctypes.data for i in range(3))
    if action == "write":
        return Ceiling("triad", [lambda: _native.bandwidth_triad(a, b, c, _MEMORY_NBYTES // 4)], memory.nbytes)
    return Ceiling("read", [lambda: _native.bandwidth_read(memory.ctypes.data, memory.nbytes)], memory.nbytes)


@functools.cache
def _memory() -> NDArray[np.uint8]:
    return np.ones(3 * _MEMORY_NBYTES, np.uint8)


def _write_file(bench: Bench, way: str, num_threads: int) -> None:
    with Target(way, bench.folder / "ceiling", bench.write_nbytes, num_threads).ready() as fill_it:
        fill_it(True)
