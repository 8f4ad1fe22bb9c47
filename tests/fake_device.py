"""A device without a GPU, for the streamed merge: as lazy as streams and events allow, and checking that they suffice.

* Nothing is carried out before somebody waits for it; then in an order drawn from what the events allow, or no more
  than has to be.
* Every access to device memory is compared with earlier ones by vector clocks: a conflict that no stream, event or
  wait of the host orders is a RaceError, whatever the order of this run.
* Bytes that a copy is to read from pinned memory may not change before it runs. Memory begins as poison.
"""

from __future__ import annotations

import ctypes
import random
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import pytest

from metagpt_fast import _native, devices
from metagpt_fast.backends.launch_tables import Launch, table_nbytes
from metagpt_fast.backends.sparse_tables import SectionedLaunch

from .arrays import POISON
from .cuda_emulation import EmulatedCompute

Range = tuple[int, int]  # address, bytes
HOST = -1


class RaceError(AssertionError):
    """Two accesses to the same memory that nothing orders."""


@dataclass
class Operation:
    run: Callable[[], object]
    name: str
    stream: int
    number: int  # in its stream, from 1
    after: tuple[int, int] | None = None  # of a wait: stream and number that have to be done


@dataclass
class FakeStream:
    index: int
    queue: deque[Operation] = field(default_factory=deque)
    num_given: int = 0
    num_done: int = 0
    clock: dict[int, int] = field(default_factory=dict)


@dataclass
class FakeEvent:
    place: tuple[int, int] | None = None  # stream and number
    clock: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Access:
    name: str
    where: Range
    writes: bool
    stream: int
    number: int


class Compute(Protocol):
    """What a kernel computes, on tables and operands that lie in this process's memory."""

    def layer_gram(self, launch: Launch, scratch: int, gram: int) -> None: ...
    def layer_merge(self, launch: Launch, num_nonfinite: int) -> None: ...
    def count_keys(self, launch: SectionedLaunch, what: int, counts: int) -> None: ...
    def layer_moments(self, launch: SectionedLaunch, scratch: int, moments: int) -> None: ...
    def layer_elect(self, launch: SectionedLaunch, num_nonfinite: int) -> None: ...
    def ranked_masks(self, launch: SectionedLaunch, scratch: int) -> None: ...
    def column_gram(self, launch: SectionedLaunch, gram: int, open_sums: int) -> None: ...
    def column_merge(self, launch: SectionedLaunch, coefficients: int, num_nonfinite: int) -> None: ...


class FakeDevice:
    """See the module. Odd seeds carry out in a random order, even ones as little as possible."""

    name = "fake:0"

    def __init__(self, seed: int = 0, compute: Compute | None = None) -> None:
        self._random = random.Random(seed)
        self._is_minimal = seed % 2 == 0
        self._compute = CpuCompute() if compute is None else compute
        self._memory: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._streams: list[FakeStream] = []
        self._host_clock: dict[int, int] = {}
        self._accesses: list[Access] = []
        self._thread = threading.get_ident()
        self.peak_nbytes = 0
        self.num_launches = 0
        self.is_closed = False
        self._has_raced = False

    # ---------------------------------------------------------------- memory

    def allocate(self, nbytes: int) -> int:
        address = _allocate(self._memory, nbytes)
        self.peak_nbytes = max(self.peak_nbytes, sum(memory.size - 256 for memory in self._memory.values()))
        return address

    def allocate_pinned(self, nbytes: int) -> int:
        return _allocate(self._pinned, nbytes)

    def free(self, address: int) -> None:
        self._check_idle(address)
        del self._memory[address]

    def free_pinned(self, address: int) -> None:
        del self._pinned[address]

    # --------------------------------------------------------------- streams

    def make_stream(self) -> FakeStream:
        stream = FakeStream(len(self._streams))
        self._streams.append(stream)
        return stream

    def make_event(self) -> FakeEvent:
        return FakeEvent()

    def copy_to_device(self, stream: FakeStream, to: int, source: int, nbytes: int) -> None:
        self._inside(self._memory, to, nbytes)
        self._inside(self._pinned, source, nbytes)
        before = zlib.crc32(_view(source, nbytes))

        def run() -> None:
            if zlib.crc32(_view(source, nbytes)) != before:
                raise self._race("pinned memory changed before it was copied to the device")
            ctypes.memmove(to, source, nbytes)

        self._give(stream, "copy_to_device", run, [(source, nbytes)], [(to, nbytes)])

    def copy_to_host(self, stream: FakeStream, to: int, source: int, nbytes: int) -> None:
        self._inside(self._pinned, to, nbytes)
        self._inside(self._memory, source, nbytes)
        self._give(
            stream, "copy_to_host", lambda: ctypes.memmove(to, source, nbytes), [(source, nbytes)], [(to, nbytes)]
        )

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        event.place, event.clock = (stream.index, stream.num_given), dict(stream.clock)

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        assert event.place is not None, "a wait for an event that was never recorded"
        self._give(stream, "wait", lambda: None, [], [], after=event.place)
        _merge(stream.clock, event.clock)

    def synchronize(self, event: FakeEvent) -> None:
        assert event.place is not None, "a wait for an event that was never recorded"
        self._carry_out(*event.place)
        _merge(self._host_clock, event.clock)
        self._forget_known()

    def layer_gram(self, stream: FakeStream, launch: Launch, scratch: int, gram: int) -> None:
        num_pairs = launch.num_operands * (launch.num_operands + 1) // 2
        used = (scratch, 8 * (launch.num_blocks + launch.num_spans) * num_pairs)
        self._inside(self._memory, *used)
        run = partial(self._compute.layer_gram, launch, scratch, gram)
        self._launch(stream, "layer_gram", run, launch, [used, (gram, 8)])

    def layer_merge(self, stream: FakeStream, launch: Launch, num_nonfinite: int) -> None:
        self._inside(self._memory, *launch.writes)
        run = partial(self._compute.layer_merge, launch, num_nonfinite)
        self._launch(stream, "layer_merge", run, launch, [launch.writes, (num_nonfinite, 8)])

    def count_keys(self, stream: FakeStream, launch: SectionedLaunch, what: int, counts: int) -> None:
        self._inside(self._memory, counts, 8)
        self._launch(
            stream, "count_keys", lambda: self._compute.count_keys(launch, what, counts), launch, [(counts, 8)]
        )

    def layer_moments(self, stream: FakeStream, launch: SectionedLaunch, scratch: int, moments: int) -> None:
        num_sums = 6 * (launch.num_operands - 1)
        used = (scratch, 8 * (launch.num_blocks + launch.num_spans) * num_sums)
        self._inside(self._memory, *used)
        run = partial(self._compute.layer_moments, launch, scratch, moments)
        self._launch(stream, "layer_moments", run, launch, [used, (moments, 8)])

    def layer_elect(self, stream: FakeStream, launch: SectionedLaunch, num_nonfinite: int) -> None:
        self._inside(self._memory, *launch.writes)
        run = partial(self._compute.layer_elect, launch, num_nonfinite)
        self._launch(stream, "layer_elect", run, launch, [launch.writes, (num_nonfinite, 8)])

    def ranked_masks(self, stream: FakeStream, launch: SectionedLaunch, scratch: int) -> None:
        used = (scratch, 9 * launch.num_items)
        self._inside(self._memory, *used)
        self._inside(self._memory, *launch.writes)
        run = partial(self._compute.ranked_masks, launch, scratch)
        self._launch(stream, "ranked_masks", run, launch, [launch.writes, used])

    def column_gram(self, stream: FakeStream, launch: SectionedLaunch, gram: int, open_sums: int) -> None:
        run = partial(self._compute.column_gram, launch, gram, open_sums)
        self._launch(stream, "column_gram", run, launch, [(gram, 8), (open_sums, 8)])

    def column_merge(self, stream: FakeStream, launch: SectionedLaunch, coefficients: int, num_nonfinite: int) -> None:
        self._inside(self._memory, *launch.writes)
        run = partial(self._compute.column_merge, launch, coefficients, num_nonfinite)
        self._launch(stream, "column_merge", run, launch, [launch.writes, (num_nonfinite, 8)])

    def drain(self) -> None:
        for stream in self._streams:
            self._carry_out(stream.index, stream.num_given)
            _merge(self._host_clock, stream.clock)
        self._forget_known()

    def close(self) -> None:
        self.is_closed = True

    # ------------------------------------------------------------- machinery

    def _launch(
        self, stream: FakeStream, name: str, run: Callable[[], object], launch: Launch, writes: list[Range]
    ) -> None:
        factors = launch.factors if isinstance(launch, SectionedLaunch) else (0, 0)
        self._inside(self._memory, *factors)
        self._give(stream, name, run, [launch.reads, factors], writes)
        self.num_launches += 1

    def _give(
        self,
        stream: FakeStream,
        name: str,
        run: Callable[[], object],
        reads: list[Range],
        writes: list[Range],
        after: tuple[int, int] | None = None,
    ) -> None:
        assert threading.get_ident() == self._thread, "a device is used by one thread"
        assert not self.is_closed
        _merge(stream.clock, self._host_clock)
        number = stream.num_given + 1
        accesses = [
            Access(name, where, is_write, stream.index, number)
            for ranges, is_write in ((reads, False), (writes, True))
            for where in ranges
        ]
        for new in accesses:
            for old in self._accesses:
                conflicts = (new.writes or old.writes) and _overlap(new.where, old.where)
                is_known = old.stream == stream.index or stream.clock.get(old.stream, 0) >= old.number
                if conflicts and not is_known:
                    raise self._race(f"{new.name} does not wait for {old.name}, which uses the same memory")
        self._accesses += accesses
        stream.num_given = stream.clock[stream.index] = number
        stream.queue.append(Operation(run, name, stream.index, number, after))

    def _carry_out(self, stream: int, number: int) -> None:
        """Carry out what was given to the streams until this place is reached."""
        while self._streams[stream].num_done < number:
            runnable = [each for each in self._streams if each.queue and self._is_ready(each.queue[0])]
            assert runnable, "the streams wait for each other"
            chosen = self._needed(stream) if self._is_minimal else self._random.choice(runnable)
            operation = chosen.queue.popleft()
            if not self._has_raced:  # what follows would compute with anything
                operation.run()
            chosen.num_done = operation.number

    def _needed(self, stream: int) -> FakeStream:
        """Follow the waits to a stream whose next operation this place depends on, and that can run."""
        each = self._streams[stream]
        while not self._is_ready(each.queue[0]):
            after = each.queue[0].after
            assert after is not None
            each = self._streams[after[0]]
        return each

    def _is_ready(self, operation: Operation) -> bool:
        return operation.after is None or self._streams[operation.after[0]].num_done >= operation.after[1]

    def _race(self, what: str) -> RaceError:
        self._has_raced = True
        return RaceError(what)

    def _forget_known(self) -> None:
        self._accesses = [each for each in self._accesses if self._host_clock.get(each.stream, 0) < each.number]

    def _check_idle(self, address: int) -> None:
        nbytes = self._memory[address].size - 256
        for access in self._accesses:
            if _overlap(access.where, (address, nbytes)):
                raise self._race(f"memory is given back that {access.name} uses")

    def _inside(self, memory: dict[int, np.ndarray], address: int, nbytes: int) -> None:
        assert nbytes == 0 or any(
            start <= address and address + nbytes <= start + array.size - 256 for start, array in memory.items()
        ), f"{nbytes} bytes at {address:#x} are not in the memory that was allocated"


@dataclass(frozen=True)
class Tables:
    """The columns of a launch's table, as csrc/cuda/layer_table.h lists them."""

    addresses: np.ndarray
    out_addresses: np.ndarray
    numels: np.ndarray
    first_blocks: np.ndarray
    first_spans: np.ndarray
    rows: np.ndarray
    coefficients: np.ndarray
    dtypes: np.ndarray
    out_dtypes: np.ndarray
    kinds: np.ndarray


def read_table(launch: Launch) -> Tables:
    k, v = launch.num_tensors, launch.num_operands
    columns = [
        ("u8", (k, v)), ("u8", (k,)), ("i8", (k,)), ("i8", (k + 1,)), ("i8", (k + 1,)), ("i8", (k,)),
        ("f8", (k, v - launch.has_base)), ("u1", (k, v)), ("u1", (k,)), ("u1", (k,)),
    ]  # fmt: skip
    memory = np.frombuffer(_view(launch.table_address, table_nbytes(k, v, launch.has_base)), np.uint8)
    arrays, offset = [], 0
    for dtype, shape in columns:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(memory, dtype, count, offset).reshape(shape).copy())
        offset += arrays[-1].nbytes
    assert offset == memory.size
    return Tables(*arrays)


class CpuCompute(EmulatedCompute):
    """The CPU's kernels in the place of the device's; of sparse methods those for the device, on the host."""

    def layer_gram(self, launch: Launch, scratch: int, gram: int) -> None:
        table = read_table(launch)
        v = launch.num_operands
        sums = np.frombuffer(_view(gram, 8 * (int(table.rows.max()) + 1) * v * v), np.float64).reshape(-1, v, v)
        part = np.ascontiguousarray(sums[table.rows])
        files = np.full(table.addresses.shape, -1, np.int32)
        _native.layer_gram(table.addresses, files, table.dtypes, table.numels, launch.has_base, part)
        sums[table.rows] = part

    def layer_merge(self, launch: Launch, num_nonfinite: int) -> None:
        table = read_table(launch)
        files = np.full(table.addresses.shape, -1, np.int32)
        found, _ = _native.layer_merge(
            table.addresses, files, table.dtypes, table.numels, launch.has_base, table.coefficients,
            table.out_addresses, files[:, 0].copy(), table.out_dtypes,
        )  # fmt: skip
        counts = np.frombuffer(_view(num_nonfinite, 8 * (int(table.rows.max()) + 1)), np.int64)
        np.add.at(counts, table.rows, found)


def _allocate(memory: dict[int, np.ndarray], nbytes: int) -> int:
    array = np.full(nbytes + 256, POISON, np.uint8)
    address = int(array.ctypes.data) + -int(array.ctypes.data) % 256
    memory[address] = array
    return address


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _overlap(a: Range, b: Range) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1] and a[1] > 0 and b[1] > 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """Open a fake device in the place of every GPU; returns the list of those that were opened."""
    opened: list[FakeDevice] = []

    def open_device(index: int) -> FakeDevice:
        opened.append(FakeDevice(17 + index))
        return opened[-1]

    monkeypatch.setattr(devices, "_open_device", open_device)
    return opened
