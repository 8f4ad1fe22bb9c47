"""Planning of output files: sizes, limits, order, headers and the index."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_fast import output_shards
from metagpt_fast.dtypes import BF16, DTYPES, F16, F32, F64
from metagpt_fast.output_shards import OutputTensor, index_file_name, index_json, plan_shards

WHOLE_BYTE_DTYPES = [dtype for dtype in DTYPES.values() if dtype.bits % 8 == 0]
ODD_NAMES = ['a"b', "back\\slash", "größe.重み", "😀", "", " ", "__metadata", "a/b", "tab\there"]


def parse(header):
    nbytes = int.from_bytes(header[:8], "little")
    assert nbytes == len(header) - 8
    return json.loads(header[8:])


def check_shard(shard):
    """Header and offsets say the same, the data is gapless, every tensor is aligned to its elements."""
    assert len(shard.header) % 4096 == 0
    assert shard.header[8:9] == b"{"
    entries = parse(shard.header)
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert list(entries) == [t.name for t in shard.tensors] == list(shard.data_offsets)
    end = len(shard.header)
    for tensor in shard.tensors:
        entry = entries[tensor.name]
        begin, end = end, end + tensor.nbytes
        assert shard.data_offsets[tensor.name] == begin
        assert entry["data_offsets"] == [begin - len(shard.header), end - len(shard.header)]
        assert entry["dtype"] == tensor.dtype.name
        assert entry["shape"] == list(tensor.shape)
        assert begin % max(tensor.dtype.bits // 8, 1) == 0
    assert shard.nbytes == end


tensor_lists = st.lists(
    st.tuples(
        st.text(max_size=20).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.sampled_from(WHOLE_BYTE_DTYPES),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    max_size=30,
    unique_by=lambda item: item[0],
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(items=tensor_lists, limit=st.integers(1, 200_000))
def test_shards_hold_every_tensor_once_within_the_limit(items, limit):
    tensors = [OutputTensor(*item) for item in items]
    shards = plan_shards(tensors, limit)
    for shard in shards:
        check_shard(shard)
        assert shard.nbytes <= limit or len(shard.tensors) <= 1
    # Each shard holds the next tensors of the list, sorted by the size of their elements.
    rest = tensors
    for shard in shards:
        group, rest = rest[: len(shard.tensors)], rest[len(shard.tensors) :]
        assert list(shard.tensors) == sorted(group, key=lambda t: -t.dtype.bits)
    assert not rest


def test_a_shard_is_filled_before_the_next_begins():
    tensors = [OutputTensor(f"w{i}", BF16, (1000,)) for i in range(10)]
    shards = plan_shards(tensors, 4096 + 3 * 2000)
    assert [len(shard.tensors) for shard in shards] == [3, 3, 3, 1]
    shards = plan_shards(tensors, 4096 + 3 * 2000 - 1)
    assert [len(shard.tensors) for shard in shards] == [2, 2, 2, 2, 2]


def test_a_tensor_above_the_limit_gets_a_file_of_its_own():
    sizes = [10, 5000, 10, 10]
    shards = plan_shards([OutputTensor(f"w{i}", F32, (n,)) for i, n in enumerate(sizes)], 8192)
    assert [[t.name for t in shard.tensors] for shard in shards] == [["w0"], ["w1"], ["w2", "w3"]]


@pytest.mark.parametrize("limit, names", [(10**9, ["x.safetensors"]), (1, ["x-00001-of-00002.safetensors"] * 2)])
def test_file_names(limit, names):
    tensors = [OutputTensor("a", F16, (3,)), OutputTensor("b", F16, (3,))]
    shards = plan_shards(tensors, limit, stem="x")
    if len(names) == 2:
        names[1] = "x-00002-of-00002.safetensors"
    assert [shard.file_name for shard in shards] == names


def test_stem_with_dashes_and_index():
    tensors = [OutputTensor("b", F64, (2,)), OutputTensor("a", F16, (3,)), OutputTensor("ä", F16, ())]
    shards = plan_shards(tensors, 1, stem="diffusion-model")
    assert index_file_name(shards) == "diffusion-model.safetensors.index.json"
    text = index_json(shards).decode()
    index = json.loads(text)
    assert index["metadata"] == {"total_size": 16 + 6 + 2}
    assert list(index["weight_map"].items()) == [
        ("a", "diffusion-model-00002-of-00003.safetensors"),
        ("b", "diffusion-model-00001-of-00003.safetensors"),
        ("ä", "diffusion-model-00003-of-00003.safetensors"),
    ]
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name):
    (shard,) = plan_shards([OutputTensor(name, F32, (2, 3))], 10**9)
    check_shard(shard)


def test_no_tensors():
    (shard,) = plan_shards([], 1)
    assert shard.nbytes == len(shard.header) == 4096
    assert parse(shard.header) == {"__metadata__": {"format": "pt"}}


def test_packed_dtypes():
    shards = plan_shards([OutputTensor("a", DTYPES["F4"], (4, 3)), OutputTensor("b", F32, (1,))], 10**9)
    check_shard(shards[0])
    with pytest.raises(ValueError, match="whole bytes"):
        plan_shards([OutputTensor("a", DTYPES["F4"], (3,))], 10**9)


def test_the_header_stays_below_the_limit_of_readers(monkeypatch):
    monkeypatch.setattr(output_shards, "MAX_HEADER_NBYTES", 8000)
    tensors = [OutputTensor(f"layers.{i}.weight", F32, (4,)) for i in range(500)]
    shards = plan_shards(tensors, 10**9)
    assert len(shards) > 1
    for shard in shards:
        check_shard(shard)
        assert len(shard.header.rstrip()) - 8 <= 8000


def test_fifty_thousand_tensors_are_fast():
    tensors = [OutputTensor(f"model.layers.{i}.mlp.experts.down_proj.weight", BF16, (4096, 512)) for i in range(50_000)]
    begin = time.process_time()
    shards = plan_shards(tensors, 5 * 10**9)
    seconds = time.process_time() - begin
    assert sum(len(shard.tensors) for shard in shards) == 50_000
    assert seconds < 1.5
