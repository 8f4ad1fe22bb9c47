"""layer_gram and layer_merge in a GPU's memory, against copies within it, and the results against the CPU's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchlib.rows import Row, Spread, gram_nbytes, merge_nbytes
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.device import Device
from metagpt_fast.backends.launch_tables import DeviceTable, Launch, pack
from metagpt_fast.benchmarking.arrays import DTYPES, LayerArrays, make_layer_arrays

_STAGING_NBYTES = 64 << 20


class TimedDevice(Device, Protocol):
    """A device with a clock."""

    def make_event(self, *, is_timed: bool = False) -> Any:
        """As of Device."""

    def seconds_between(self, first: Any, second: Any) -> float:
        """Return the seconds between two timed events."""


class DeviceLayer:
    """A layer's operands and output on the device, as ``num_tensors`` tensors of equal size."""

    def __init__(self, device: TimedDevice, layer: LayerArrays, num_tensors: int = 1) -> None:
        self.device, self.layer = device, layer
        self._stream = device.make_stream()
        self._staging = device.allocate_pinned(_STAGING_NBYTES)
        self._done = device.make_event()
        self._events = [device.make_event(is_timed=True) for _ in range(2)]
        self._arrays = [device.allocate(array.nbytes) for array in layer.arrays]
        for address, array in zip(self._arrays[:-1], layer.arrays, strict=False):
            self._upload(address, array)
        self._make_launches(num_tensors)

    def _make_launches(self, num_tensors: int) -> None:
        device, layer, size = self.device, self.layer, self.layer.dtype.itemsize
        num_operands = layer.num_models + 1
        # Multiples of 4096, so that pieces begin where 16-byte loads can; the last one takes the rest.
        each = layer.numel // num_tensors // 4096 * 4096
        numels = np.full(num_tensors, each, np.int64)
        numels[-1] = layer.numel - each * (num_tensors - 1)
        firsts = np.cumsum(numels) - numels
        places = (np.array(self._arrays, np.int64)[None, :] + firsts[:, None] * size).astype(np.uint64)
        code = layer.dtype.code
        table = DeviceTable(
            addresses=np.ascontiguousarray(places[:, :-1]),
            dtypes=np.full((num_tensors, num_operands), code, np.uint8),
            numels=numels,
            has_base=True,
            rows=np.arange(num_tensors),
            out_addresses=np.ascontiguousarray(places[:, -1]),
            out_dtypes=np.full(num_tensors, code, np.uint8),
            coefficients=np.repeat(layer.coefficients, num_tensors, axis=0),
        )
        self._launches = {}
        for merges in (False, True):
            packed, num_blocks, num_spans, kinds = pack(table, merges=merges)
            address = device.allocate(packed.nbytes)
            self._upload(address, packed)
            self._launches[merges] = Launch(
                address, num_tensors, num_operands, True, num_blocks, num_spans, kinds,
                (self._arrays[0], layer.arrays[0].nbytes), (self._arrays[-1], layer.arrays[-1].nbytes),
            )  # fmt: skip
        num_pairs = num_operands * (num_operands + 1) // 2
        self._scratch = device.allocate(8 * num_pairs * (num_blocks + num_spans))
        self._gram_shape = (num_tensors, num_operands, num_operands)
        self._gram = device.allocate(8 * num_tensors * num_operands**2)
        self._counts = device.allocate(8 * num_tensors)

    def time(self, work: Callable[[], None], num_rounds: int) -> list[float]:
        """Return the seconds of each round of something that is given to the layer's stream, after one more."""
        first, second = self._events
        seconds = []
        for number in range(num_rounds + 1):
            self.device.record(first, self._stream)
            work()
            self.device.record(second, self._stream)
            self.device.synchronize(second)
            if number:
                seconds.append(self.device.seconds_between(first, second))
        return seconds

    def copy(self) -> None:
        """Copy the base to the output's place."""
        self.device.copy_to_device(self._stream, self._arrays[-1], self._arrays[0], self.layer.arrays[0].nbytes)

    def gram(self) -> None:
        """Start layer_gram; it adds to what is there."""
        self.device.layer_gram(self._stream, self._launches[False], self._scratch, self._gram)

    def merge(self) -> None:
        """Start layer_merge."""
        self.device.layer_merge(self._stream, self._launches[True], self._counts)

    def differences(self) -> list[str]:
        """Return what differs from the CPU's results: nothing, if all is well. For one tensor."""
        gram = np.zeros(self._gram_shape)
        self._upload(self._gram, gram)
        self.gram()
        self._download(gram.view(np.uint8).reshape(-1), self._gram)
        expected = np.zeros_like(gram)
        cpu = CpuBackend()
        cpu.layer_gram(self.layer.table, expected)
        found = [] if gram.tobytes() == expected.tobytes() else ["the Gram matrix"]
        self.merge()
        merged = np.empty_like(self.layer.arrays[-1])
        self._download(merged, self._arrays[-1])
        cpu.layer_merge(self.layer.table, self.layer.coefficients, self.layer.out_table)
        return found if np.array_equal(merged, self.layer.arrays[-1]) else [*found, "the merged tensor"]

    def close(self) -> None:
        """Give the memory back."""
        device = self.device
        device.drain()
        launches = [launch.table_address for launch in self._launches.values()]
        for address in (*self._arrays, *launches, self._scratch, self._gram, self._counts):
            device.free(address)
        device.free_pinned(self._staging)

    def _upload(self, address: int, array: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _STAGING_NBYTES):
            part = raw[start : start + _STAGING_NBYTES]
            ctypes.memmove(self._staging, part.ctypes.data, part.size)
            self.device.copy_to_device(self._stream, address + start, self._staging, part.size)
            self._wait()

    def _download(self, raw: NDArray[np.uint8], address: int) -> None:
        for start in range(0, raw.size, _STAGING_NBYTES):
            part = raw[start : start + _STAGING_NBYTES]
            self.device.copy_to_host(self._stream, self._staging, address + start, part.size)
            self._wait()
            ctypes.memmove(part.ctypes.data, self._staging, part.size)

    def _wait(self) -> None:
        self.device.record(self._done, self._stream)
        self.device.synchronize(self._done)


def measure_kernels(
    device: TimedDevice,
    cases: Sequence[tuple[str, int, int, int]],
    num_rounds: int,
    baselines: Callable[[LayerArrays], dict[tuple[str, str], list[float]]] | None = None,
) -> tuple[list[Row], list[str]]:
    """Return a row per kernel and case ``(dtype, T, numel, tensors)``, and what was not the CPU's result.

    Args:
        device: where.
        cases: which.
        num_rounds: of kernel and copy.
        baselines: other implementations, for layers of one tensor: seconds by kernel and metric (``speedup_torch``), or
            by kernel and ``triton``, which makes rows of its own.
    """
    rows, wrong = [], []
    for name, num_models, numel, num_tensors in cases:
        layer = make_layer_arrays(DTYPES[name], num_models, numel)
        on_device = DeviceLayer(device, layer, num_tensors)
        try:
            copies = on_device.time(on_device.copy, num_rounds)
            times = {
                ("layer_gram", "cuda"): on_device.time(on_device.gram, num_rounds),
                ("layer_merge", "cuda"): on_device.time(on_device.merge, num_rounds),
            }
            if num_tensors == 1:
                wrong += [f"{what} of {name}, T = {num_models}" for what in on_device.differences()]
        finally:
            on_device.close()
        others = baselines(layer) if baselines is not None and num_tensors == 1 else {}
        times |= {key: seconds for key, seconds in others.items() if key[1] == "triton"}
        ceiling = [2 * layer.arrays[0].nbytes / seconds / 1e9 for seconds in copies]
        for (kernel, made_with), seconds in times.items():
            rows.append(_row(kernel, made_with, layer, num_tensors, seconds, Spread.of(ceiling), others))
    return rows, wrong


def _row(
    kernel: str,
    made_with: str,
    layer: LayerArrays,
    num_tensors: int,
    seconds: list[float],
    ceiling: Spread,
    others: dict[tuple[str, str], list[float]],
) -> Row:
    count = gram_nbytes if kernel == "layer_gram" else merge_nbytes
    nbytes = count(layer.numel, layer.dtype.itemsize, layer.num_models)
    rate = [nbytes / each / 1e9 for each in seconds]
    metrics = {
        "seconds": Spread.of(seconds),
        "gb_per_s": Spread.of(rate),
        "ceiling_gb_per_s": ceiling,
        "percent_of_ceiling": Spread.of([100 * each / ceiling.median for each in rate]),
    }
    for (of_kernel, metric), theirs in others.items():
        if of_kernel == kernel and metric != "triton":
            metrics[metric] = Spread.of([each / metrics["seconds"].median for each in theirs])
    dtype = layer.dtype.name.lower()
    name = f"{kernel} {made_with} {dtype} T={layer.num_models} numel={layer.numel} tensors={num_tensors}"
    parameters = {
        "kernel": kernel, "made_with": made_with, "dtype": dtype, "num_models": layer.num_models,
        "numel": layer.numel, "num_tensors": num_tensors,
    }  # fmt: skip
    formula = "(1+T)·n·itemsize" if kernel == "layer_gram" else "(2+T)·n·itemsize"
    return Row("gpu kernels", name, parameters, metrics, formula, nbytes)
