"""How long a merge takes, from what was measured: a formula without a clock or a file. docs/benchmarks.md derives it.

A scope (all of the model, or a layer) of I bytes in base and T models has two phases: it is measured, then combined,
which writes I / (1 + T) bytes. In a phase the disk reads ahead while the kernels work, so it takes the longer of both:

    phase = max(bytes not in the page cache / disk_read, work of the CPU, or of bus and host)

The disk writes behind, from the first combined scope on. With R bytes read from then on, and W written:

    merge = start + measuring the first scope + max(sum of the other phases, r + w of the disk)
    r + w = max(R / disk_read, W / disk_write) + sharing · min(R / disk_read, W / disk_write)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .rates import BusRates, Rates
from .work import Work

WINDOW_NBYTES = 256 << 20
"""What a merge maps at a time: a scope that fits is read once, and is still mapped when it is combined."""

DISK_READ, DISK_WRITE, MEMORY, KERNELS, BUS, START = "disk read", "disk write", "memory", "kernels", "bus", "start"
_MIN_SHARE_OF_CEILING = 0.8
"""A kernel slower than this part of its memory's speed is what a phase waits for, and not the memory."""

Parts = dict[str, float]
"""Seconds by what was waited for."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A merge's time.

    Attributes:
        seconds: from its start to the output on the disk.
        parts: the same by what is waited for: ``disk read``, ``disk write``, ``memory`` (the page cache included),
            ``kernels``, ``bus``, ``start``.
        nbytes_again: bytes that are read a second time.
        nbytes_again_cached: how many of them are still in the page cache.
    """

    seconds: float
    parts: Parts
    nbytes_again: float
    nbytes_again_cached: float

    @property
    def bottleneck(self) -> str:
        """Return what most of the time is waited for."""
        return max(self.parts, key=lambda name: self.parts[name])


def fits_in_cache(work: Work, cache_nbytes: float) -> bool:
    """Return whether all inputs stay in the page cache while the output is written, too."""
    return work.nbytes_in + work.nbytes_out <= cache_nbytes


def predict(
    work: Work, rates: Rates, cache_nbytes: float, *, is_warm: bool = False, on_gpu: bool = False
) -> Prediction:
    """Return how long a merge takes that waits until its output is on the disk, as ``merge`` does by default.

    Args:
        work: what is merged.
        rates: the machine.
        cache_nbytes: memory that the page cache can have.
        is_warm: whether all inputs are in the page cache when it begins, and stay there (``fits_in_cache``).
        on_gpu: whether the kernels run on the GPU of ``rates.bus``.

    Raises:
        ValueError: ``on_gpu`` without a bus.
    """
    total = _Total(rates)
    for number, nbytes in enumerate(work.scopes):
        nbytes_out = nbytes / (1 + work.num_models)
        cold = 0.0 if is_warm else nbytes
        is_once = nbytes <= WINDOW_NBYTES
        measuring, combining = _computing(nbytes, nbytes_out, rates, is_mapped=is_once, on_gpu=on_gpu)
        if is_once:
            total.add(cold, {name: measuring[name] + combining[name] for name in measuring}, nbytes_out)
            continue
        # Combining begins with what was read last. Its output takes room in the cache, and pushes out the oldest.
        cached = nbytes if is_warm else min(nbytes, cache_nbytes / (1 + nbytes_out / nbytes))
        total.add(cold, measuring, 0.0, writes_behind=number > 0)
        total.add(nbytes - cached, combining, nbytes_out)
        total.again += nbytes
        total.again_cached += cached
    return total.prediction()


@dataclass
class _Total:
    """Phases that are added up. ``behind`` and ``read``: seconds and bytes from the first written byte on."""

    rates: Rates
    parts: Parts = field(default_factory=dict)
    behind: float = 0.0
    read: float = 0.0
    written: float = 0.0
    again: float = 0.0
    again_cached: float = 0.0

    def add(self, cold: float, computing: Parts, nbytes_out: float, *, writes_behind: bool = True) -> None:
        """Add a phase that reads ``cold`` bytes from the disk."""
        reading, working = cold / self.rates.disk_read, _longest(computing)
        spent = {DISK_READ: reading} if reading >= working else _waited_for(computing)
        for name, seconds in spent.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds
        if writes_behind:
            self.behind += max(reading, working)
            self.read += cold
            self.written += nbytes_out

    def prediction(self) -> Prediction:
        reading, writing = self.read / self.rates.disk_read, self.written / self.rates.disk_write
        disk = max(reading, writing) + self.rates.sharing * min(reading, writing)
        parts = {START: self.rates.start_seconds, **self.parts, DISK_WRITE: max(0.0, disk - self.behind)}
        return Prediction(sum(parts.values()), parts, self.again, self.again_cached)


def _computing(nbytes: float, nbytes_out: float, rates: Rates, *, is_mapped: bool, on_gpu: bool) -> tuple[Parts, Parts]:
    """Return the seconds of measuring and of combining a scope, if the disk takes none.

    ``is_mapped``: it is still mapped when it is combined. Memory and kernels follow each other in every thread; the
    bus of a GPU works beside them.
    """
    mapping, again = nbytes / rates.cache_read, nbytes / (rates.memory_read if is_mapped else rates.cache_read)
    writing = nbytes_out / rates.cache_write
    if on_gpu:
        return _streaming(mapping, again, writing, nbytes, nbytes_out, rates)
    measuring = _with_kernel(mapping, nbytes, rates.layer_gram, rates.memory_read)
    combining = _with_kernel(again, nbytes + nbytes_out, rates.layer_merge, rates.memory_triad)
    combining[MEMORY] += writing
    return measuring, combining


def _with_kernel(reading: float, nbytes: float, kernel: float, ceiling: float) -> Parts:
    """Return the time of a kernel: that of ``reading``, and what the kernel is slower than memory."""
    excess = max(0.0, nbytes / kernel - nbytes / ceiling)
    if kernel >= _MIN_SHARE_OF_CEILING * ceiling:
        return {MEMORY: reading + excess, KERNELS: 0.0, BUS: 0.0}
    in_kernel = min(nbytes / kernel, reading + excess)
    return {MEMORY: reading + excess - in_kernel, KERNELS: in_kernel, BUS: 0.0}


def _streaming(
    mapping: float, again: float, writing: float, nbytes: float, nbytes_out: float, rates: Rates
) -> tuple[Parts, Parts]:
    """Return the same for a GPU: threads copy to memory that the bus takes it from. The kernels are never the limit."""
    bus: BusRates | None = rates.bus
    if bus is None:
        raise ValueError("no bus to a GPU was measured")
    copying = nbytes / rates.memory_triad
    measuring = {MEMORY: mapping + copying, KERNELS: 0.0, BUS: nbytes / bus.to_device}
    to_and_from = max(nbytes / bus.to_device, nbytes_out / bus.to_host)
    return measuring, {MEMORY: again + copying + writing, KERNELS: 0.0, BUS: to_and_from}


def _longest(computing: Parts) -> float:
    return max(computing[MEMORY] + computing[KERNELS], computing[BUS])


def _waited_for(computing: Parts) -> Parts:
    if computing[BUS] > computing[MEMORY] + computing[KERNELS]:
        return {BUS: computing[BUS]}
    return {name: computing[name] for name in (MEMORY, KERNELS)}
