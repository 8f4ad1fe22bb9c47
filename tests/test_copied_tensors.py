"""Tensors that are not merged: integer buffers, excluded ones, and those that no model changed."""

from __future__ import annotations

import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16, DTYPES, F16, F32

from .arrays import special_bits
from .checkpoints import (
    I64,
    Tensor,
    integers,
    random_states,
    read_state,
    tensor,
    tensor_bytes,
    write_family,
    write_state,
)


def states_with(extra, *others):
    """A base and two models with the tensors of ``extra``, each as it is or as ``others`` has it in the models."""
    states = random_states(51, [(BF16,)] * 3, {"layers.0.a": (50, 3)})
    for state, tensors in zip(states, [extra, *others, *[extra] * 2], strict=False):
        state.update(tensors)
    return states


@pytest.mark.parametrize("name", ["I64", "I32", "U8", "BOOL", "U64"])
def test_equal_integers_are_copied(tmp_path, name):
    raw = np.arange(16, dtype=np.uint8) % 2
    buffer = Tensor(DTYPES[name], (16 * 8 // DTYPES[name].bits,), raw)
    base, models = write_family(tmp_path / "in", states_with({"ids": buffer, "none": Tensor(I64, (0,), raw[:0])}))
    report = mf.merge(base, models, tmp_path / "out")
    merged = read_state(tmp_path / "out")
    assert merged["ids"].dtype is buffer.dtype
    assert merged["ids"].raw.tobytes() == raw.tobytes()
    assert merged["none"].shape == (0,)
    assert report.num_copied == 2


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (integers([1, 2, 4]), "other values"),
        (Tensor(DTYPES["I32"], (3,), np.array([1, 2, 3], np.int32).view(np.uint8)), "I32"),
    ],
)
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_different_integers_are_refused(tmp_path, other, got, io):
    states = states_with({"ids": integers([1, 2, 3])}, {"ids": integers([1, 2, 3])}, {"ids": other})
    base, models = write_family(tmp_path / "in", states)
    with pytest.raises(mf.PlanError, match="integer tensor 'ids' of m1 differs") as caught:
        mf.merge(base, models, tmp_path / "out", io=io)
    assert caught.value.where == str(models[1] / "model.safetensors")
    assert caught.value.got == got
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_late_difference_in_a_large_buffer_is_found(tmp_path):
    values = np.zeros(9 << 20, np.uint8)
    buffer, other = Tensor(DTYPES["U8"], values.shape, values), Tensor(DTYPES["U8"], values.shape, values.copy())
    other.raw[-1] = 1
    base, models = write_family(tmp_path / "in", states_with({"mask": buffer}, {"mask": buffer}, {"mask": other}))
    with pytest.raises(mf.PlanError, match="'mask' of m1"):
        mf.merge(base, models, tmp_path / "out")
    mf.merge(base, models, tmp_path / "out", exclude="^mask$")
    assert read_state(tmp_path / "out")["mask"].raw.tobytes() == values.tobytes()


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_excluded_tensors_are_the_bases(tmp_path, granularity):
    base_values, others = {"head": tensor([[1.0, -0.0]], F32)}, {"head": tensor(np.ones((9, 2)))}
    base, models = write_family(tmp_path / "in", states_with(base_values, others, others))
    without = random_states(51, [(BF16,)] * 3, {"layers.0.a": (50, 3)})
    base_without, models_without = write_family(tmp_path / "without", without)
    settings = {"granularity": granularity, "dtype": "f16"}
    report = mf.merge(base, models, tmp_path / "out", exclude="head", **settings)
    expected = mf.merge(base_without, models_without, tmp_path / "expected", **settings)
    np.testing.assert_array_equal(report.coefficients, expected.coefficients)
    merged = read_state(tmp_path / "out")
    # As it is: --dtype is for merged tensors.
    assert (merged["head"].dtype, merged["head"].shape) == (F32, (1, 2))
    assert merged.pop("head").raw.tobytes() == base_values["head"].raw.tobytes()
    assert {name: each.raw.tobytes() for name, each in merged.items()} == tensor_bytes(tmp_path / "expected")
    assert (report.num_tensors, report.num_copied, report.exclude) == (2, 1, "head")


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_unchanged_tensors_keep_every_bit(tmp_path, granularity, dtype):
    """Arithmetic would turn −0.0 into 0.0: −0 + λ·0 = 0."""
    special = special_bits(dtype, finite=True)
    frozen = Tensor(dtype, (special.size // dtype.itemsize,), special)
    # Large squares would drown the rest of the norms; they are the base's own and in no task vector.
    base, models = write_family(tmp_path / "in", states_with({"layers.0.frozen": frozen}))
    for exponent in (2, -1):
        report = mf.merge(base, models, tmp_path / f"out{exponent}", granularity=granularity, exponent=exponent)
        assert read_state(tmp_path / f"out{exponent}")["layers.0.frozen"].raw.tobytes() == special.tobytes()
        assert report.num_copied == 1


@pytest.mark.parametrize("window_nbytes", [1, 2**20])
def test_an_unchanged_tensor_larger_than_the_window(tmp_path, monkeypatch, window_nbytes):
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: window_nbytes)
    frozen = tensor(np.resize([-0.0, 1.0, 0.0], 600_000))
    base, models = write_family(tmp_path / "in", states_with({"layers.0.frozen": frozen}))
    assert mf.merge(base, models, tmp_path / "out").num_copied == 1
    assert read_state(tmp_path / "out")["layers.0.frozen"].raw.tobytes() == frozen.raw.tobytes()


def test_an_unchanged_tensor_is_converted_where_the_dtype_is(tmp_path):
    frozen = tensor([1.0, 1 / 3, 0.0], F32)
    base, models = write_family(tmp_path / "in", states_with({"layers.0.frozen": frozen}))
    assert mf.merge(base, models, tmp_path / "out", dtype="bf16").num_copied == 0
    merged = read_state(tmp_path / "out")["layers.0.frozen"]
    assert merged.raw.tobytes() == tensor([1.0, 1 / 3, 0.0], BF16).raw.tobytes()


def test_the_smallest_change_is_a_change(tmp_path):
    """Its square is far below the smallest fp32 number."""
    zero, least = tensor([0.0, 1.0], F32), tensor([2.0**-149, 1.0], F32)
    states = [{"a": zero}, {"a": least}]
    base, models = write_family(tmp_path / "in", states)
    report = mf.merge(base, models, tmp_path / "out")
    assert report.num_copied == 0
    assert read_state(tmp_path / "out")["a"].raw.tobytes() == least.raw.tobytes()


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("reuse", [False, True])
def test_models_that_all_equal_the_base_are_refused(tmp_path, granularity, reuse):
    state = random_states(52, [(BF16,)], {"a": (10,), "layers.0.b": (3, 3)})[0]
    base, models = write_family(tmp_path / "in", [state, state, state])
    measurement = tmp_path / "in" / "m.json"
    if reuse:
        mf.measure(base, models).save(measurement)
    with pytest.raises(mf.DataError, match="every model equals the base") as caught:
        mf.merge(base, models, tmp_path / "out", granularity=granularity, measurement=measurement)
    assert "m0, m1" in caught.value.got
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_one_unchanged_model_is_left_out(tmp_path):
    states = random_states(53, [(BF16,)] * 2, {"a": (100,)})
    base, models = write_family(tmp_path / "in", [*states, states[0]])
    report = mf.merge(base, models, tmp_path / "out")
    assert report.coefficients.tolist() == [[1.0, 0.0]]
    assert [w for w in report.warnings if "m1 equals the base" in w]
    assert tensor_bytes(tmp_path / "out") == {"a": states[1]["a"].raw.tobytes()}


def test_a_bare_file_as_the_base(tmp_path):
    states = states_with({"ids": integers([3])})
    base = write_state(tmp_path / "base.safetensors", states[0])
    models = [write_state(tmp_path / f"m{t}", state) for t, state in enumerate(states[1:])]
    report = mf.merge(base, models, tmp_path / "merged.safetensors")
    assert report.num_copied == 1
    assert read_state(tmp_path / "merged.safetensors").keys() == states[0].keys()
    assert (tmp_path / "merged.metagpt_fast.json").exists()
