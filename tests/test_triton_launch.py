"""How layers are cut for the GPU kernels: plain arithmetic, without a GPU and without Triton."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_fast.dtypes import BF16, F16, F32, F64, MERGEABLE
from metagpt_fast.kernels import launch

BLOCKS = [256, 1024, 4096]


def elements_of(tiles, numels, block_numel):
    """Follow the table as the kernels do: the (first, end) that each program works on, by tensor."""
    found = {k: [] for k in range(len(numels))}
    for program in range(tiles.num_programs):
        tensor, first_tile = tiles.entries[program // tiles.tiles_per_entry]
        start = (first_tile + program % tiles.tiles_per_entry) * block_numel
        assert tiles.first_programs[tensor] <= program < tiles.first_programs[tensor + 1]
        if start < numels[tensor]:
            found[tensor].append((start, min(start + block_numel, numels[tensor])))
    return found


@given(
    numels=st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 3_000_000)), max_size=8),
    block_numel=st.sampled_from(BLOCKS),
)
def test_every_element_has_one_program(numels, block_numel):
    tiles = launch.cut(numels, block_numel)
    assert len(tiles.first_programs) == len(numels) + 1
    for numel, pieces in zip(numels, elements_of(tiles, numels, block_numel).values(), strict=True):
        assert pieces == [(a, min(a + block_numel, numel)) for a in range(0, numel, block_numel)]


def test_tables_stay_small_and_few_programs_idle():
    layer = [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2  # of Llama 7B: 202 M elements
    tiles = launch.cut(layer, 4096)
    assert len(tiles.entries) < 1000
    assert tiles.num_programs < 1.01 * sum(layer) / 4096
    rows = launch.cut([4096] * 11008, 4096)  # each row a tensor of its own
    assert rows.num_programs == 11008


def test_offsets_beyond_32_bits():
    numel = 5 * 2**31 + 3
    tiles = launch.cut([numel, 10], 4096)
    assert tiles.entries[-2][1] * 4096 <= numel
    assert tiles.num_programs < 2**31
    with pytest.raises(ValueError, match="at most 2147483647"):
        launch.cut([2**43], 4096)


def test_alignment():
    codes = [BF16.code, F32.code]
    assert launch.alignment_of([0, 16], codes) == launch.VECTOR
    assert launch.alignment_of([2, 16], codes) == launch.NATURAL
    assert launch.alignment_of([16, 2], codes) == launch.BYTES
    assert launch.alignment_of([1, 16], codes) == launch.BYTES


def test_itemsizes_are_those_of_the_dtypes():
    assert tuple(d.itemsize for d in sorted(MERGEABLE, key=lambda d: d.code)) == launch.ITEMSIZES
    assert F64.code == launch.F64


@pytest.mark.parametrize("num_operands", range(1, launch.MAX_OPERANDS + 1))
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
def test_launch_parameters(dtype, num_operands):
    codes = (dtype.code,) * num_operands
    launches = [launch.wide_gram_launch(codes), launch.merge_launch(codes, dtype.code), launch.sparse_launch(codes)]
    if dtype is not F64:
        launches.append(launch.gram_launch(codes))
        assert launches[-1].block_numel == launches[0].block_numel  # tiles that are summed again are the same
        assert launches[-1].block_numel % (launches[-1].num_threads * launches[-1].run_numel) == 0
        assert launches[-1].run_numel * dtype.itemsize == launch.VECTOR
    assert launches[0].block_numel % launches[0].chunk_numel == 0
    for each in launches:
        assert each.block_numel & (each.block_numel - 1) == 0
        assert each.num_threads in {128, 256}
        assert each.block_numel % 4 == 0


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("num_operands", [1, 2, 8, 9, 10, 11, 16, 17, 34])
def test_groups_of_operands_cover_the_matrix_once(num_operands, has_base):
    asked = []
    for operands, wanted in launch.operand_groups(num_operands, has_base):
        assert len(operands) <= launch.MAX_OPERANDS
        assert list(operands) == sorted(set(operands))
        assert not has_base or operands[0] == 0
        assert all(i in operands and j in operands for i, j in wanted)
        asked += wanted
    everything = [(i, j) for i, j in itertools.product(range(num_operands), repeat=2) if i <= j]
    assert sorted(asked) == everything


def test_power_of_two():
    assert [launch.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 10, 45, 64)] == [1, 1, 2, 4, 4, 8, 16, 64, 64]


def test_launch_needs_neither_triton_nor_torch():
    code = "import sys, metagpt_fast.kernels.launch; print([n for n in ('triton', 'torch') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").strip() == "[]"
