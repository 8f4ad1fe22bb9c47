"""What of a machine decides how long a merge takes, in bytes per second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BusRates:
    """The bus of a GPU. Attributes: its name; bytes per second to the device, and back."""

    name: str
    to_device: float
    to_host: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, by all of the kernels' threads where nothing else is said.

    Attributes:
        memory_read: a plain read of memory.
        memory_triad: ``a = b + 3·c``, counted as 12 bytes per element.
        layer_gram: base and models in memory, (1 + T) · n · itemsize.
        layer_merge: base, models and output in memory, (2 + T) · n · itemsize.
        disk_read: files that are not in the page cache, as a merge reads them.
        cache_read: the same, in the page cache: mapped, each page touched for the first time.
        cache_write: into files whose space is reserved, not waiting for the disk.
        disk_write: a new file until all of it is on the disk.
        sharing: how far reading and writing at once slow each other: 0 not at all, 1 as if one waited for the other.
        start_seconds: what any merge takes, however small.
        bus: that of the GPU, if one can be used.
    """

    memory_read: float
    memory_triad: float
    layer_gram: float
    layer_merge: float
    disk_read: float
    cache_read: float
    cache_write: float
    disk_write: float
    sharing: float
    start_seconds: float
    bus: BusRates | None = None


def sharing_of(read_seconds: float, write_seconds: float, both_seconds: float) -> float:
    """Return ``Rates.sharing`` from the times of reading alone, of writing alone, and of both begun at once.

    Both at once take max + sharing · min of the two; what is measured outside of 0 to 1 counts as the nearer end.
    """
    longer, shorter = max(read_seconds, write_seconds), min(read_seconds, write_seconds)
    return min(1.0, max(0.0, (both_seconds - longer) / shorter)) if shorter > 0 else 0.0
