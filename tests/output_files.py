"""Small checkpoints, written with the writer under test."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np

from metagpt_fast.dtypes import DTYPES
from metagpt_fast.writer import CheckpointWriter, OutputTensor, plan_shards

SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (1, 1, 9), (129, 31)]
NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def make_arrays():
    rng = np.random.default_rng(0)
    arrays = {}
    for name, dtype in NUMPY_DTYPES.items():
        for index, shape in enumerate(SHAPES):
            values = rng.integers(0, 2 if name == "BOOL" else 100, size=shape)
            arrays[f"layer.{index}.größe 重み '\"\\ {name}"] = np.asarray(values).astype(dtype)
    return arrays


def output_tensors(arrays):
    names = {np.dtype(dtype): DTYPES[name] for name, dtype in NUMPY_DTYPES.items()}
    return [OutputTensor(name, names[array.dtype], array.shape) for name, array in arrays.items()]


def write(target, arrays, *, limit=10**9, overwrite=False, files=()):
    shards = plan_shards(output_tensors(arrays), limit)
    with CheckpointWriter(target, shards, overwrite=overwrite) as writer:
        for name, array in arrays.items():
            slot = writer.slot(name)
            assert os.pwrite(slot.fd, array.tobytes(), slot.data_offset) == array.nbytes
        for name, content in files:
            writer.add_file(name, content)
        writer.finish()
    return shards


def small(value=1.0):
    return {"a": np.full((2, 3), value, np.float32), "b": np.full((4,), value, np.float16)}


def writer_for(target, *, overwrite=False):
    return CheckpointWriter(target, plan_shards(output_tensors(small()), 10**9), overwrite=overwrite)
