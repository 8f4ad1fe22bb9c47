"""Slices through a device: read → pinned slot → device slot → kernel → device slot → pinned slot → write.

Four things go on at once, on different slices: threads read, the copy engine brings a slice in, the kernel runs, and
what it made goes out and is written. What keeps them apart, for slot n mod NUM_SLOTS of slice n:

| before | wait for |
|---|---|
| a thread reads into a pinned slot | `copied_in`: the copy from it, of slice n − NUM_SLOTS |
| a copy into a device slot | `computed`: the kernel that read it |
| a kernel | `copied_in` of this slice (its result's slot is free: the last row has been waited for) |
| a copy out of a device slot | `computed` of this slice; that the threads have written the pinned slot |
| a thread writes from a pinned slot | `copied_out` of this slice, which is before slice n + NUM_SLOTS is launched |
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .._native import FileOperandError
from .slices import NUM_PARTS, NUM_SLOTS, Limits, Slice, Transfer
from .tables import MEMORY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device import Device, Event, Stream

# Thousands of tiny tensors have a block each; more of them than this do not go into one slot.
_LEAST_BLOCK_NBYTES = 4096
# Larger slices gain no speed on the bus (8 MiB take 0.15 ms and more), and the way in and out takes longer to fill.
_SLICE_NBYTES = 8 << 20
_CHUNK_NBYTES = 2 << 20  # what one thread reads or writes at a time
_READ_AHEAD = NUM_SLOTS - 2  # slices that are read while one is copied and one is computed with
_WRITE_LAG = 2  # slices between a kernel's launch and the wait for its result


@dataclass
class Slot:
    """A pair of buffers of the same size, pinned and on the device, and what is known about their use."""

    pinned: int
    device: int
    copied: Event
    transfers: list[Future[None]] = field(default_factory=list)

    def finish_transfers(self) -> None:
        """Wait for the threads that read into the pinned buffer, or write from it; raises what they raised."""
        transfers, self.transfers = self.transfers, []
        for transfer in transfers:
            transfer.result()


@dataclass(frozen=True)
class Job:
    """What a stream of slices does.

    Attributes:
        prepare: the bytes of a slice's table, and the launch that reads it, given the device addresses of its slots of
            input and output.
        reads: what is read into a slice's slot.
        writes: what is written from it; not asked where a slice has no results.
        launch: starts the kernels on a stream.
        check: sums up a slice's results in the pinned memory at an address, in a thread that writes; or None.
    """

    prepare: Callable[[Slice, int, int], tuple[NDArray[np.uint8], Any]]
    reads: Callable[[Slice], list[Transfer]]
    writes: Callable[[Slice], list[Transfer]]
    launch: Callable[[Stream, Any], None]
    check: Callable[[Slice, int], None] | None = None


class Pipeline:
    """The slots, streams and threads of one device.

    Args:
        device: where to compute; used by the calling thread only.
        device_nbytes: memory to take there, and nearly as much pinned memory.
        num_threads: threads that read, and as many that write.

    Attributes:
        compute: the stream of the kernels.
        scratch, scratch_nbytes: device memory that kernels may use from launch to launch, and its size.
    """

    def __init__(self, device: Device, device_nbytes: int, num_threads: int) -> None:
        self.device = device
        nbytes = device_nbytes // NUM_PARTS // 256 * 256
        self._slot_nbytes = nbytes
        self._copy_in, self.compute, self._copy_out = (device.make_stream() for _ in range(3))
        self._inputs = [self._slot() for _ in range(NUM_SLOTS)]
        self._outputs = [self._slot() for _ in range(NUM_SLOTS)]
        self._computed = [device.make_event() for _ in range(NUM_SLOTS)]
        self._launches: dict[int, Any] = {}  # by slot
        self.scratch, self.scratch_nbytes = device.allocate(nbytes), nbytes
        self._readers = ThreadPoolExecutor(num_threads, thread_name_prefix="metagpt_fast-read")
        self._writers = ThreadPoolExecutor(num_threads, thread_name_prefix="metagpt_fast-write")

    def limits(self, scratch_nbytes_per_block: int) -> Limits:
        """Return what fits a slot, for kernels that need so much scratch memory for each block."""
        return Limits(
            self._slot_nbytes, _SLICE_NBYTES, self._slot_nbytes // max(scratch_nbytes_per_block, _LEAST_BLOCK_NBYTES)
        )

    def run(self, slices: Sequence[Slice], job: Job) -> None:
        """Carry out all slices, and wait until everything is done.

        Raises:
            FileOperandError: a file cannot be read or written.
            BackendError: the device failed.
        """
        try:
            self._run(slices, job)
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Give memory and threads back."""
        self._readers.shutdown()
        self._writers.shutdown()
        self.device.close()

    def _run(self, slices: Sequence[Slice], job: Job) -> None:
        num_read = num_retired = 0
        for number, part in enumerate(slices):
            while num_read < min(number + 1 + _READ_AHEAD, len(slices)):
                self._start_reading(num_read, slices[num_read], job)
                num_read += 1
            self._advance(number, part, job)
            while num_retired < number + 1 - _WRITE_LAG:
                self._start_writing(num_retired, slices[num_retired], job)
                num_retired += 1
        for number in range(num_retired, len(slices)):
            self._start_writing(number, slices[number], job)
        for slot in self._outputs:
            slot.finish_transfers()
        end = self._computed[(len(slices) - 1) % NUM_SLOTS]
        if slices:
            self.device.synchronize(end)

    def _start_reading(self, number: int, part: Slice, job: Job) -> None:
        slot = self._inputs[number % NUM_SLOTS]
        if number >= NUM_SLOTS:
            self.device.synchronize(slot.copied)
        output = self._outputs[number % NUM_SLOTS]
        table, self._launches[number % NUM_SLOTS] = job.prepare(part, slot.device, output.device)
        ctypes.memmove(slot.pinned, table.ctypes.data, table.nbytes)
        slot.transfers = [
            self._readers.submit(_read, slot.pinned, chunk) for each in job.reads(part) for chunk in _chunks(each)
        ]

    def _advance(self, number: int, part: Slice, job: Job) -> None:
        """Bring a slice in, start its kernel, and send out what it makes: all of it only asked for."""
        device, place = self.device, number % NUM_SLOTS
        slot, output, computed = self._inputs[place], self._outputs[place], self._computed[place]
        slot.finish_transfers()
        if number >= NUM_SLOTS:
            device.wait(self._copy_in, computed)
        device.copy_to_device(self._copy_in, slot.device, slot.pinned, part.nbytes)
        device.record(slot.copied, self._copy_in)
        device.wait(self.compute, slot.copied)
        job.launch(self.compute, self._launches[place])
        device.record(computed, self.compute)
        if part.out_nbytes:
            output.finish_transfers()
            device.wait(self._copy_out, computed)
            device.copy_to_host(self._copy_out, output.pinned, output.device, part.out_nbytes)
            device.record(output.copied, self._copy_out)

    def _start_writing(self, number: int, part: Slice, job: Job) -> None:
        if not part.out_nbytes:
            return
        output = self._outputs[number % NUM_SLOTS]
        self.device.synchronize(output.copied)
        output.transfers = [
            self._writers.submit(_write, output.pinned, chunk) for each in job.writes(part) for chunk in _chunks(each)
        ]
        if job.check is not None:
            output.transfers.append(self._writers.submit(job.check, part, output.pinned))

    def _abandon(self) -> None:
        """After an error: no thread and no copy may touch slots or files when this returns."""
        transfers = [transfer for slot in (*self._inputs, *self._outputs) for transfer in slot.transfers]
        for transfer in transfers:
            transfer.cancel()
        wait(transfers)
        for slot in (*self._inputs, *self._outputs):
            slot.transfers = []
        self.device.drain()

    def _slot(self) -> Slot:
        device = self.device
        return Slot(device.allocate_pinned(self._slot_nbytes), device.allocate(self._slot_nbytes), device.make_event())


def _chunks(transfer: Transfer) -> list[Transfer]:
    return [
        Transfer(
            transfer.offset + start,
            transfer.address + start,
            transfer.file,
            min(_CHUNK_NBYTES, transfer.nbytes - start),
            transfer.tensor,
            transfer.operand,
        )
        for start in range(0, transfer.nbytes, _CHUNK_NBYTES)
    ]


def _read(pinned: int, transfer: Transfer) -> None:
    if transfer.file == MEMORY:
        ctypes.memmove(pinned + transfer.offset, transfer.address, transfer.nbytes)  # without Python's lock
        return
    view, done = _view(pinned, transfer), 0
    while done < transfer.nbytes:
        try:
            count = os.preadv(transfer.file, [view[done:]], transfer.address + done)
        except OSError as error:
            raise _error("read", transfer, error.errno or 0, error.strerror or str(error)) from error
        if count == 0:
            raise _error("read", transfer, 0, "the file ended early")
        done += count


def _write(pinned: int, transfer: Transfer) -> None:
    if transfer.file == MEMORY:
        ctypes.memmove(transfer.address, pinned + transfer.offset, transfer.nbytes)
        return
    view, done = _view(pinned, transfer), 0
    while done < transfer.nbytes:
        try:
            done += os.pwrite(transfer.file, view[done:], transfer.address + done)
        except OSError as error:
            raise _error("write", transfer, error.errno or 0, error.strerror or str(error)) from error


def _view(pinned: int, transfer: Transfer) -> memoryview:
    return memoryview((ctypes.c_char * transfer.nbytes).from_address(pinned + transfer.offset)).cast("B")


def _error(action: str, transfer: Transfer, number: int, reason: str) -> OSError:
    """Return the error that the CPU's kernels raise for a file operand."""
    text = f"cannot {action} {transfer.nbytes} bytes at offset {transfer.address}: {reason}"
    error = FileOperandError(number, text)
    error.tensor, error.operand = transfer.tensor, transfer.operand  # type: ignore[attr-defined]
    return error
