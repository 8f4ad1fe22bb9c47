"""The order of the work: every element measured once and combined once, in batches that fit the window."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_fast.checkpoint import TensorSource
from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.plan import LayerPlan, TensorPlan
from metagpt_fast.schedule import Batch, make_schedule

SPAN_NUMEL = 8


def plans(scopes):
    """Scopes of tensors that lie one behind the other, with these numbers of elements and dtypes."""
    offsets: dict[Path, int] = {}
    layers = []
    for number, tensors in enumerate(scopes):
        made = []
        for index, (numel, dtypes) in enumerate(tensors):
            sources = []
            for operand, dtype in enumerate(dtypes):
                path = Path(f"model{operand}")
                sources.append(TensorSource(f"{number}.{index}", dtype, (numel,), path, offsets.get(path, 100)))
                offsets[path] = sources[-1].data_offset + sources[-1].nbytes
            name = sources[0].name
            made.append(TensorPlan(name, (numel,), str(number), sources[0], tuple(sources[1:]), dtypes[0], "merge"))
        layers.append(LayerPlan(str(number), tuple(made)))
    return layers


tensors = st.tuples(st.integers(0, 50), st.lists(st.sampled_from([BF16, F16, F32, F64]), min_size=3, max_size=3))
families = st.lists(st.lists(tensors, min_size=1, max_size=4), min_size=1, max_size=5).map(plans)
windows = st.one_of(st.integers(1, 5000), st.just(10**9))


def elements(steps, action):
    """Which elements of which row the steps work on, in order."""
    pieces = [piece for step in steps if step.action == action for piece in step.batch.pieces]
    return [(piece.row, piece.first + i) for piece in pieces for i in range(piece.numel)]


@patch("metagpt_fast.schedule.SPAN_NUMEL", SPAN_NUMEL)
@given(scopes=families, window_nbytes=windows)
def test_batches(scopes, window_nbytes):
    flat = [tensor for scope in scopes for tensor in scope.tensors]
    everything = [(row, i) for row, tensor in enumerate(flat) for i in range(tensor.numel)]
    steps = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True)
    assert elements(steps, "measure") == everything  # in order, which the sums depend on
    assert sorted(elements(steps, "combine")) == everything
    for batch in [step.batch for step in steps if step.batch is not None]:
        assert batch.pieces
        rows = [piece.row for piece in batch.pieces]
        assert len(rows) == len(set(rows))  # the kernels take a tensor once
        assert all(piece.tensor is flat[piece.row] for piece in batch.pieces)
        assert all(piece.first % SPAN_NUMEL == 0 for piece in batch.pieces)
        alone = len(batch.pieces) == 1 and batch.pieces[0].numel <= SPAN_NUMEL
        assert batch.nbytes <= window_nbytes or alone


@patch("metagpt_fast.schedule.SPAN_NUMEL", SPAN_NUMEL)
@given(scopes=families, window_nbytes=windows)
def test_a_scope_is_measured_then_solved_then_combined(scopes, window_nbytes):
    steps = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True)
    row_of = {tensor.name: row for row, tensor in enumerate(t for scope in scopes for t in scope.tensors)}
    solved = [scope for step in steps for scope in step.scopes]
    assert solved == list(range(len(scopes)))
    for number, scope in enumerate(scopes):
        rows = {row_of[tensor.name] for tensor in scope.tensors}
        solving = next(i for i, step in enumerate(steps) if number in step.scopes)
        for i, step in enumerate(steps):
            if step.batch is not None and rows & {piece.row for piece in step.batch.pieces}:
                assert (i < solving) == (step.action == "measure")


@patch("metagpt_fast.schedule.SPAN_NUMEL", SPAN_NUMEL)
@given(scopes=families, window_nbytes=windows)
def test_combining_begins_with_what_was_measured_last(scopes, window_nbytes):
    """Also where the batch is still mapped: it is the same object, which the layer pass does not release."""
    steps = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True)
    round_of_batches: list[Batch] = []
    for step in steps:
        if step.action == "measure":
            round_of_batches.append(step.batch)
        elif step.action == "combine":
            assert step.batch is round_of_batches.pop()


@given(scopes=families, window_nbytes=windows)
def test_only_measuring_and_only_combining(scopes, window_nbytes):
    both = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True)
    only_measuring = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=False)
    assert only_measuring == [step for step in both if step.action == "measure"]
    only_combining = make_schedule(scopes, window_nbytes=window_nbytes, measure=False, combine=True)
    assert {step.action for step in only_combining} <= {"solve", "combine"}
    assert elements(only_combining, "combine") == elements(both, "measure")  # forwards: nothing was read before


@given(scopes=families, window_nbytes=windows)
def test_whole_tensors_where_pieces_will_not_do(scopes, window_nbytes):
    steps = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True, is_cuttable=False)
    batches = [step.batch for step in steps if step.action == "measure"]
    pieces = [piece for batch in batches for piece in batch.pieces]
    assert [(piece.row, piece.first, piece.numel) for piece in pieces] == [
        (row, 0, tensor.numel) for row, tensor in enumerate(t for scope in scopes for t in scope.tensors)
    ]
    for batch in batches:
        assert batch.is_mapped == (batch.nbytes <= window_nbytes)
        assert batch.is_mapped or len(batch.pieces) == 1


@given(scopes=families, window_nbytes=windows)
def test_ranges_cover_the_batch(scopes, window_nbytes):
    for step in make_schedule(scopes, window_nbytes=window_nbytes, measure=False, combine=True):
        if step.batch is None:
            continue
        joined = {(path, byte) for path, offset, nbytes in step.batch.ranges for byte in range(offset, offset + nbytes)}
        single = [part for piece in step.batch.pieces for part in piece.ranges()]
        assert joined == {(path, byte) for path, offset, nbytes in single for byte in range(offset, offset + nbytes)}
        assert sum(nbytes for _, _, nbytes in step.batch.ranges) == step.batch.nbytes == len(joined)
        ends = {(path, offset + nbytes) for path, offset, nbytes in step.batch.ranges}
        assert ends.isdisjoint((path, offset) for path, offset, nbytes in step.batch.ranges if nbytes)


@pytest.mark.parametrize(("window_nbytes", "actions"), [(10**9, "mmcsc"), (64, "mscmsc")])
def test_scopes_that_fit_together_are_one_round(window_nbytes, actions):
    scopes = plans([[(8, [BF16, BF16, BF16])], [(8, [BF16, BF16, BF16])]])
    steps = make_schedule(scopes, window_nbytes=window_nbytes, measure=True, combine=True)
    if window_nbytes == 10**9:
        assert [step.action for step in steps] == ["measure", "solve", "combine"]
        assert steps[1].scopes == (0, 1)
    else:
        assert "".join(step.action[0] for step in steps) == actions
