"""What methods that prune, or work by columns, do on a GPU, from files to a file, beside the CPU in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchlib.gpu_kernels import TimedDevice
from benchlib.gpu_streaming import NUM_MODELS, Files, compare_outputs, make_files
from benchlib.rows import Row, Spread
from metagpt_fast.backends import Backend
from metagpt_fast.backends.cpu import CpuBackend
from metagpt_fast.backends.streamed import StreamedBackend
from metagpt_fast.backends.tables import LayerElection, LayerTable, MaskTable

_COLUMNS = 4096  # of rows that DELLA ranks, that have a factor, and whose elements are those of columns
_ALL_KEYS = 0xFFFFFFFF
_BAND, _RANDOM, _RANKED = 1, 2, 3
# How often an action reads its inputs from files; then elements written.
_PASSES = {
    "threshold": 3,
    "threshold by importance": 3,
    "moments": 1,
    "elect": 1,
    "moments by rank": 2,
    "elect by rank": 2,
    "column gram": 1,
    "column merge": 1,
}
_WRITING = ("elect", "elect by rank", "column merge")
_MAGNITUDE, _IMPORTANCE = 0, 2


def measure_sparse(
    device: TimedDevice, folder: Path, numel: int, device_nbytes: int, num_rounds: int
) -> tuple[list[Row], list[str]]:
    """Return a row per action, and what was not the CPU's result. Closes the device.

    Every batch of the file is a tensor: the thresholds of TIES at a density of 0.2 and the same of magnitudes times
    factors of rows, the sums of DARE, the election of TIES, sums and election with DELLA's masks, Gram matrices of
    columns and a merge with coefficients of columns.
    """
    backend = StreamedBackend(device, device_nbytes)
    seconds: dict[str, list[list[float]]] = {action: [[], []] for action in _PASSES}
    wrong: list[str] = []
    with make_files(folder, numel) as files:
        try:
            for _ in range(num_rounds):
                results = [_run(each, files, number, seconds) for number, each in enumerate((backend, CpuBackend()))]
                wrong = [action for action in results[0] if results[0][action] != results[1][action]]
                wrong += compare_outputs(files, "what was merged last, by columns")
        finally:
            backend.close()
    rows = []
    for action, passes in _PASSES.items():
        nbytes = passes * files.nbytes_in + (2 * numel if action in _WRITING else 0)
        ours, theirs = seconds[action]
        metrics = {
            "seconds": Spread.of(ours),
            "gb_per_s": Spread.of([nbytes / each / 1e9 for each in ours]),
            "speedup_cpu": Spread.of([cpu / gpu for cpu, gpu in zip(theirs, ours, strict=True)]),
        }
        parameters = {"action": action, "numel": numel, "num_models": NUM_MODELS, "device_nbytes": device_nbytes}
        name = f"{action} bf16 T={NUM_MODELS} numel={numel}, files in the page cache"
        formula = f"{passes}·(1+T)·n·itemsize" + (" + n·itemsize" if action in _WRITING else "")
        rows.append(Row("gpu streaming", name, parameters, metrics, formula, nbytes))
    return rows, [f"streamed {each}" for each in dict.fromkeys(wrong)]


def _run(backend: Backend, files: Files, number: int, seconds: dict[str, list[list[float]]]) -> dict[str, list[bytes]]:
    """Carry out all actions, with output ``number``, and add up their times; return what they found."""
    found: dict[str, list[bytes]] = {action: [] for action in _PASSES}
    total = dict.fromkeys(_PASSES, 0.0)

    def timed(action: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        total[action] += time.perf_counter() - started
        return result

    for layer, first in files.batches():
        columns, numel = np.full(1, _COLUMNS, np.int64), int(layer.numels[0])
        factors = np.random.default_rng(0).uniform(0.1, 10.0, numel // _COLUMNS)
        addresses = np.array([factors.ctypes.data], np.uint64)
        ranks = np.full((1, NUM_MODELS, 1), numel // 5 - 1, np.int64)
        for action, kind in (("threshold by importance", _IMPORTANCE), ("threshold", _MAGNITUDE)):
            keys, indices = timed(action, lambda: backend.layer_threshold(layer, columns, addresses, kind, ranks))  # noqa: B023
            found[action] += [keys.tobytes(), indices.tobytes()]
        band = _masks(layer, _BAND)
        band.keys[..., 0], band.keys[..., 1], band.indices[..., 1] = _ALL_KEYS, keys[..., 0], indices[..., 0]
        cases = [("", _masks(layer, _RANDOM), band), (" by rank", *[_masks(layer, _RANKED)] * 2)]
        for kind, measured, elected in cases:
            sums = timed(f"moments{kind}", lambda: backend.layer_moments(layer, measured))  # noqa: B023
            found[f"moments{kind}"].append(sums.tobytes())
            out = files.out(number, first)
            written = timed(f"elect{kind}", lambda: backend.layer_elect(layer, elected, _election(), out))  # noqa: B023
            found[f"elect{kind}"].append(written.crcs.tobytes())
        grams = timed("column gram", lambda: backend.column_gram(layer, columns))  # noqa: B023
        found["column gram"] += [gram.tobytes() for gram in grams]
        shares = [np.linspace(-0.5, 1.0, NUM_MODELS * _COLUMNS).reshape(_COLUMNS, NUM_MODELS)]
        written = timed("column merge", lambda: backend.column_merge(layer, columns, shares, out))  # noqa: B023
        found["column merge"].append(written.crcs.tobytes())
    for action, spent in total.items():
        seconds[action][number].append(spent)
    return found


def _masks(layer: LayerTable, kind: int) -> MaskTable:
    shape = (layer.num_tensors, NUM_MODELS)
    ends = np.broadcast_to(np.array([1 << 30, 3 << 30], np.uint64), (*shape, 2)).copy()
    return MaskTable(
        key_kind=0,
        kinds=np.full(shape, kind, np.uint8),
        keys=np.zeros((*shape, 2), np.uint32),
        indices=np.zeros((*shape, 2), np.int64),
        probabilities=ends,
        streams=np.arange(shape[1], dtype=np.uint64)[None].repeat(shape[0], axis=0),
        values=np.zeros(shape),
        row_factors=np.zeros(shape[0], np.uint64),
        columns=np.full(shape[0], _COLUMNS, np.int64),
        bits=np.zeros(shape, np.uint64),
    )


def _election() -> LayerElection:
    ones = np.ones((1, NUM_MODELS))
    plain = LayerElection(ones, ones, ones, ones, np.ones(1), np.zeros(1), np.ones(1, np.uint8), np.ones(1, np.uint8))
    return replace(plain, scales=ones * 0.5)
