"""The streamed merge from files to a file, against the slower of the bus, and of reading and writing."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchlib.gpu_kernels import TimedDevice
from benchlib.rows import Row, Spread
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.backends.tables import LayerTable, OutputTable, layer_table, output_table
from metagpt_fast.benchmarking.arrays import DTYPES, make_layer_arrays

NUM_MODELS = 3
_BATCH_NBYTES = 256 << 20  # what layer_pass hands to a backend
_CHUNK_NBYTES = 2 << 20
_NUM_THREADS = 4
_COPY_NBYTES = 8 << 20


@dataclass(frozen=True)
class Files:
    """Base, models and two outputs, each ``numel`` elements of bf16 in a file of its own, open."""

    numel: int
    inputs: tuple[int, ...]
    outputs: tuple[int, int]

    @property
    def nbytes_in(self) -> int:
        """Return the bytes of base and models."""
        return self.numel * 2 * len(self.inputs)

    def batches(self) -> Iterator[tuple[LayerTable, int]]:
        """Yield the layer batch by batch, and each one's first element."""
        code = DTYPES["bf16"].code
        assert code is not None
        step = _BATCH_NBYTES // (2 * len(self.inputs)) // 262144 * 262144
        for first in range(0, self.numel, step):
            places = [[(2 * first, file, code) for file in self.inputs]]
            yield layer_table(places, [min(step, self.numel - first)], True), first

    def out(self, number: int, first: int) -> OutputTable:
        """Return where a batch of one of the outputs goes."""
        code = DTYPES["bf16"].code
        assert code is not None
        return output_table([(2 * first, self.outputs[number], code)])


@contextmanager
def make_files(folder: Path, numel: int) -> Iterator[Files]:
    """Write the inputs, which leaves them in the page cache, and make room for the outputs."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        layer = make_layer_arrays(DTYPES["bf16"], NUM_MODELS, numel)
        descriptors = []
        for number, array in enumerate((*layer.arrays, layer.arrays[-1])):
            descriptors.append(os.open(Path(name) / str(number), os.O_RDWR | os.O_CREAT, 0o600))
            for start in range(0, array.nbytes, 64 << 20):
                os.pwrite(descriptors[-1], array[start : start + (64 << 20)].data, start)
        del layer
        try:
            yield Files(numel, tuple(descriptors[:-2]), (descriptors[-2], descriptors[-1]))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def measure_streaming(
    device: TimedDevice, folder: Path, numel: int, device_nbytes: int, num_rounds: int
) -> tuple[list[Row], list[str]]:
    """Return a row for measuring and one for combining, and what was not the CPU's result. Closes the device."""
    coefficients = np.array([[0.5, 0.3, 0.2]])
    with make_files(folder, numel) as files:
        bus = _bus_bytes_per_second(device)
        backend = StreamedBackend(device, device_nbytes)
        seconds: dict[str, list[float]] = {"measure": [], "combine": []}
        ceilings: dict[str, list[float]] = {"measure": [], "combine": []}
        grams = [np.zeros((1, NUM_MODELS + 1, NUM_MODELS + 1)) for _ in range(2)]
        try:
            for _ in range(num_rounds):
                grams[0][:] = 0
                started = time.perf_counter()
                for layer, _first in files.batches():
                    backend.layer_gram(layer, grams[0])
                seconds["measure"].append(time.perf_counter() - started)
                started = time.perf_counter()
                for layer, first in files.batches():
                    backend.layer_merge(layer, coefficients, files.out(0, first))
                seconds["combine"].append(time.perf_counter() - started)
                reading, writing = _file_seconds(files.inputs, files.outputs[1], numel * 2)
                to_device, to_host = files.nbytes_in / bus[0], numel * 2 / bus[1]
                ceilings["measure"].append(max(reading, to_device))
                ceilings["combine"].append(max(reading + writing, to_device, to_host))
        finally:
            backend.close()
        wrong = _compare(files, grams, coefficients)
    rows = []
    for action, formula, nbytes in (
        ("measure", "(1+T)·n·itemsize", files.nbytes_in),
        ("combine", "(2+T)·n·itemsize", files.nbytes_in + numel * 2),
    ):
        metrics = {
            "seconds": Spread.of(seconds[action]),
            "gb_per_s": Spread.of([nbytes / each / 1e9 for each in seconds[action]]),
            "ceiling_gb_per_s": Spread.of([nbytes / each / 1e9 for each in ceilings[action]]),
            "percent_of_ceiling": Spread.of(
                [100 * best / each for best, each in zip(ceilings[action], seconds[action], strict=True)]
            ),
        }
        notes = (f"bus: {bus[0] / 1e9:.1f} GB/s to the device, {bus[1] / 1e9:.1f} GB/s back",)
        parameters = {"action": action, "numel": numel, "num_models": NUM_MODELS, "device_nbytes": device_nbytes}
        name = f"{action} bf16 T={NUM_MODELS} numel={numel}, files in the page cache"
        rows.append(Row("gpu streaming", name, parameters, metrics, formula, nbytes, notes))
    return rows, wrong


def _compare(files: Files, grams: list[np.ndarray], coefficients: np.ndarray) -> list[str]:
    cpu = CpuBackend()
    for layer, first in files.batches():
        cpu.layer_gram(layer, grams[1])
        cpu.layer_merge(layer, coefficients, files.out(1, first))
    wrong = [] if grams[0].tobytes() == grams[1].tobytes() else ["the streamed Gram matrix"]
    return wrong + compare_outputs(files, "the streamed merge")


def compare_outputs(files: Files, what: str) -> list[str]:
    """Return ``what`` if the two outputs differ."""
    for start in range(0, files.numel * 2, _CHUNK_NBYTES):
        ours, theirs = (os.pread(file, _CHUNK_NBYTES, start) for file in files.outputs)
        if ours != theirs:
            return [what]
    return []


def _bus_bytes_per_second(device: TimedDevice) -> tuple[float, float]:
    """Return the speed of copies to the device and back, in pieces like the merge's."""
    pinned, address, stream = device.allocate_pinned(_COPY_NBYTES), device.allocate(_COPY_NBYTES), device.make_stream()
    first, second = device.make_event(is_timed=True), device.make_event(is_timed=True)
    speeds = []
    for copy, to, source in ((device.copy_to_device, address, pinned), (device.copy_to_host, pinned, address)):
        for _ in range(2):  # the first time wakes the bus
            device.record(first, stream)
            for _ in range(32):
                copy(stream, to, source, _COPY_NBYTES)
            device.record(second, stream)
            device.synchronize(second)
        speeds.append(32 * _COPY_NBYTES / device.seconds_between(first, second))
    device.free(address)
    device.free_pinned(pinned)
    return speeds[0], speeds[1]


def _file_seconds(inputs: Sequence[int], output: int, nbytes: int) -> tuple[float, float]:
    """Return the time that as many threads as the merge has need to read the inputs, and to write the output."""
    buffers: dict[int, bytearray] = {}

    def buffer() -> bytearray:
        import threading

        return buffers.setdefault(threading.get_ident(), bytearray(_CHUNK_NBYTES))

    starts = range(0, nbytes, _CHUNK_NBYTES)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        started = time.perf_counter()
        list(
            pool.map(lambda place: os.preadv(place[0], [buffer()], place[1]), [(f, s) for f in inputs for s in starts])
        )
        reading = time.perf_counter() - started
        started = time.perf_counter()
        list(pool.map(lambda start: os.pwrite(output, memoryview(buffer())[: nbytes - start], start), starts))
        return reading, time.perf_counter() - started
