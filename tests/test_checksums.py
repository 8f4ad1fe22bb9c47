"""CRC32C: known answers, any bytes in any parts, and the checksums of what each kernel and backend writes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metagpt_fast as mf
from metagpt_fast import _native, merging
from metagpt_fast.backends import make_backend
from metagpt_fast.backends.tables import output_table
from metagpt_fast.checksums import OutputChecksums, consecutive_crc32c, file_crc32c, join_crc32c
from metagpt_fast.dtypes import BF16, F16, F32
from metagpt_fast.output_shards import OutputTensor, plan_shards

from .arrays import Buffer, make_layer
from .checkpoints import integers, random_states, write_family
from .checksum_oracle import check_checksums, slow_crc32c
from .kernel_calls import FileBuffer, dtype_code, kernels, layer_table_of
from .sparse_calls import BAND, RANDOM, Keys, random_election, random_masks

SPAN = _native.SPAN_NUMEL
# RFC 3720, appendix B.4: the CRC's bytes go over the wire from the lowest on.
VECTORS = {
    b"": 0,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    bytes.fromhex(
        "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 00000000"
    ): 0xD9963A56,
}  # fmt: skip


@pytest.mark.parametrize(("data", "crc"), VECTORS.items())
def test_known_answers(data, crc):
    assert slow_crc32c(data) == crc
    assert _native.crc32c(data) == crc
    assert _native.crc32c(memoryview(data)) == crc
    assert _native.crc32c(np.frombuffer(data, np.uint8)) == crc


@given(st.binary(max_size=3000), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_any_bytes(data, shift):
    padded = bytes(shift) + data
    assert _native.crc32c(memoryview(padded)[shift:]) == slow_crc32c(data)


@given(st.lists(st.binary(max_size=600), max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_parts(parts):
    crcs, sizes = [_native.crc32c(part) for part in parts], [len(part) for part in parts]
    assert join_crc32c(crcs, sizes) == slow_crc32c(b"".join(parts))
    addresses = np.array([np.frombuffer(part, np.uint8).ctypes.data for part in parts], np.uint64)
    assert _native.crc32c_of_memory(addresses, np.array(sizes, np.int64)).tolist() == crcs


def test_long_runs_of_zeros():
    """Sizes that no memory holds: doubling the bytes, joined, gives what doubling gives."""
    crc, nbytes = _native.crc32c(bytes(1000)), 1000
    assert join_crc32c([crc] * 1024, [nbytes] * 1024) == _native.crc32c(bytes(1000 * 1024))
    for _ in range(40):
        crc, nbytes = join_crc32c([crc, crc], [nbytes, nbytes]), 2 * nbytes
    thirds = join_crc32c([_native.crc32c(bytes(1000)), 0, 0], [1000, 1 << 40, 5])
    assert thirds == join_crc32c([_native.crc32c(bytes(1000)), 0], [1000, (1 << 40) + 5])
    assert crc != 0


def test_memory_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        _native.crc32c(np.zeros((8, 8), np.uint8)[:, :4])


@pytest.mark.parametrize(
    ("nbytes", "owners", "num_owners"),
    [([1, 1], [1, 0], 2), ([1, 1], [0, 2], 2), ([1, 1], [-1, 0], 2), ([1, -1], [0, 0], 1), ([1], [0, 0], 1)],
)
def test_parts_that_make_no_sense(nbytes, owners, num_owners):
    with pytest.raises(ValueError, match=r"owners|nbytes"):
        _native.crc32c_join(np.zeros(2, np.uint32), np.array(nbytes), np.array(owners), num_owners)


def test_parts_of_several_wholes():
    parts = [b"ab", b"", b"c", b"defg"]
    crcs = np.array([_native.crc32c(part) for part in parts], np.uint32)
    joined = _native.crc32c_join(crcs, np.array([2, 0, 1, 4]), np.array([1, 1, 1, 3]), 5)
    assert joined.tolist() == [0, slow_crc32c(b"abc"), 0, slow_crc32c(b"defg"), 0]


@pytest.mark.parametrize("window", [1, 1000, 1 << 20, 64 << 20])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_files(tmp_path, monkeypatch, window, num_threads):
    monkeypatch.setattr("metagpt_fast.checksums._WINDOW_NBYTES", window)
    sizes = [0, 5, 0, 700, 1, 40] if window == 1 else [4096, 0, 700_001, 1, 3, 300_000, 0]
    raw = np.random.default_rng(0).bytes(sum(sizes))
    (tmp_path / "file").write_bytes(raw)
    ends = np.cumsum(sizes)
    told = []
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with kernels(num_threads=num_threads):
        found = consecutive_crc32c(fd, sizes, told.append)
        assert file_crc32c(fd, 3, 500) == slow_crc32c(raw[3:503])
        with pytest.raises(OSError, match="ended early"):
            consecutive_crc32c(fd, [*sizes, 1], told.append)
        with pytest.raises(_native.FileOperandError) as caught:
            _native.crc32c_of_file(fd, np.array([0, len(raw) - 1]), np.array([1, 2]))
        assert _native.place_of(caught.value)[0] == 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            file_crc32c(1 << 20, 0, 1)
        with pytest.raises(ValueError, match="negative"):
            file_crc32c(fd, -1, 1)
    os.close(fd)
    assert found == [slow_crc32c(raw[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    assert sum(told) >= len(raw)


@pytest.fixture(scope="module")
def layer():
    return make_layer(np.random.default_rng(3), (BF16, F32, BF16), (5, 0, 1500, 64, SPAN + 100))


@pytest.fixture
def out(layer, tmp_path):
    """Results in files and, one of them, in memory; some of them next to one another in one file."""
    shared = tmp_path / "shared"
    shared.write_bytes(b"")
    fd = os.open(shared, os.O_RDWR)
    alone = FileBuffer(tmp_path / "alone", Buffer(F32, layer[4][0].numel), 9)
    memory = Buffer(BF16, layer[2][0].numel)
    places = [(7, fd, BF16.code), (17, fd, BF16.code), (memory.address, -1, BF16.code), (17, fd, F16.code)]
    places.append((alone.address, alone.descriptor, dtype_code(alone)))
    sizes = [tensor[0].numel * 2 for tensor in layer]

    def written():
        pieces = [os.pread(fd, size, place[0]) for place, size in zip(places, sizes, strict=True)]
        return [pieces[0], pieces[1], b"", pieces[3], alone.raw.tobytes()]

    yield output_table(places), written
    alone.close()
    os.close(fd)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_what_kernels_write(layer, out, name):
    backend, table = make_backend(name), layer_table_of(layer)
    places, written = out
    rng = np.random.default_rng(4)
    columns = np.array([5, 1, 300, 8, SPAN + 100])
    lines = [rng.normal(size=(int(c), 2)) for c in columns]
    masks = random_masks(rng, layer, Keys(layer), [BAND, RANDOM])
    election = random_election(rng, layer)
    calls = {
        "layer_merge": lambda: backend.layer_merge(table, np.full((5, 2), 0.3), places),
        "column_merge": lambda: backend.column_merge(table, columns, lines, places),
        "layer_elect": lambda: backend.layer_elect(table, masks, election, places),
    }
    expected = {}
    for isa in _native.supported_isas() if name == "cpu" else ["auto"]:
        for num_threads in (1, 2):
            with kernels(isa=isa, num_threads=num_threads):
                for kernel, call in calls.items():
                    got = call().crcs.tolist()
                    assert got == [slow_crc32c(raw) for raw in written()], (kernel, isa)
                    assert expected.setdefault(kernel, got) == got
    assert len({tuple(each) for each in expected.values()}) == 3


def test_pieces_in_any_order():
    shards = plan_shards([OutputTensor("a", F32, (7,)), OutputTensor("b", BF16, (3,)), OutputTensor("c", F32, (0,))], 1)
    raw = np.random.default_rng(5).bytes(28)
    checksums = OutputChecksums(shards)
    for first, end in [(20, 28), (4, 20), (4, 4), (0, 4)]:
        checksums.add("a", first, end - first, _native.crc32c(raw[first:end]))
    assert checksums.complete(["a", "c"]) == {"a": f"{slow_crc32c(raw):08x}", "c": "00000000"}
    with pytest.raises(ValueError, match="'b'"):
        checksums.record()
    checksums.restore({"b": "0000beef"})
    record = checksums.record()["shards"]
    assert [[each["crc32c"] for each in shard["tensors"]] for shard in record] == [
        [f"{slow_crc32c(raw):08x}"], ["0000beef"], ["00000000"]
    ]  # fmt: skip
    assert record[0]["crc32c"] == f"{slow_crc32c(shards[0].header + raw):08x}"
    checksums.add("b", 0, 6, 0xF00D)  # written again, because its file was not as it was left
    assert checksums.complete(["b"]) == {"b": "0000f00d"}


@pytest.mark.parametrize("pieces", [[(0, 4), (8, 20)], [(0, 28), (0, 28)], [(0, 20), (16, 12)], [(4, 24)], [(0, 29)]])
def test_pieces_that_do_not_make_up_the_tensor(pieces):
    checksums = OutputChecksums(plan_shards([OutputTensor("a", F32, (7,))], 1000))
    for first, nbytes in pieces:
        checksums.add("a", first, nbytes, 1)
    with pytest.raises(ValueError, match="'a'"):
        checksums.complete(["a"])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"granularity": "layer", "exclude": "b$"},
        {"granularity": "tensor", "dtype": "f32", "io": "pread"},
        {"backend": "reference"},
        {"method": "ties", "parameters": {"density": 0.4}},
        {"method": "nuslerp", "parameters": {"nuslerp_row_wise": True}},
        {"method": "nuslerp", "parameters": {"nuslerp_row_wise": False}},
    ],
    ids=str,
)
def test_merges(tmp_path, monkeypatch, arguments):
    """Tensors in pieces, combined from the last to the first; copied, unchanged, and empty ones; several files."""
    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1 << 20)
    shapes = {"layers.0.a": (130, 4100), "layers.0.norm": (8,), "layers.1.b": (65, 33), "b": (40, 9), "none": (0, 3)}
    states = random_states(6, [(BF16,)] * 3, shapes)
    for state in states:
        state["ids"] = integers([1, 2, 3])
        state["layers.1.same"] = states[0]["layers.0.norm"]
    base, models = write_family(tmp_path / "in", states)
    mf.merge(base, models, tmp_path / "out", max_shard_size=20_000, **arguments)
    check_checksums(tmp_path / "out")
    assert mf.verify(tmp_path / "out").ok
