"""The journal: whole records come back, and nothing that was torn, lost or damaged does."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from metagpt_fast.journal import Journal, pack_array, read_records, unpack_array

RECORDS = [
    {"job": {"dtype": "keep"}},
    {"records": [{"written": ["größe 重み '\"\\ \n\r\u2028 \ud7ff"]}]},
    {"n": [1, None, 0.1]},
]


def written(path):
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    assert (journal.num_records, journal.last_record) == (3, RECORDS[-1])
    journal.close()
    journal.close()
    return path.read_bytes()


def test_records_come_back(tmp_path):
    path = tmp_path / "journal"
    assert read_records(path) == []
    written(path)
    assert read_records(path) == RECORDS
    journal = Journal(path)
    assert journal.records == RECORDS
    journal.append({"more": 1})
    journal.close()
    assert read_records(path) == [*RECORDS, {"more": 1}]


def test_every_torn_write_is_seen(tmp_path):
    path = tmp_path / "journal"
    content = written(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        num_whole = sum(end <= size for end in ends)
        assert read_records(path) == RECORDS[:num_whole]
        journal = Journal(path)
        journal.append({"after": size})
        journal.close()
        assert read_records(path) == [*RECORDS[:num_whole], {"after": size}]


def test_every_damaged_byte_is_seen(tmp_path):
    """As of a disk that had only some of the blocks when the power failed."""
    path = tmp_path / "journal"
    content = written(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for place in range(len(content)):
        for value in (0, content[place] ^ 1):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            assert read_records(path) == RECORDS[: sum(end <= place for end in ends)]


def test_a_record_of_another_journal_does_not_count(tmp_path):
    """Blocks of a file that was there before may come back after a power failure."""
    path = tmp_path / "journal"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert read_records(path) == RECORDS[:1]
    path.write_bytes(lines[0] + lines[0])
    assert read_records(path) == RECORDS[:1]


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_record_that_could_not_be_written_leaves_no_trace(tmp_path, monkeypatch, call):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append(RECORDS[0])
    pwrite = os.pwrite

    def failing(fd, *arguments):
        if call == "pwrite":
            pwrite(fd, arguments[0][:10], arguments[1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match="No space"):
            journal.append(RECORDS[1])
    assert read_records(path) == RECORDS[:1]
    journal.append(RECORDS[2])
    journal.close()
    assert read_records(path) == [RECORDS[0], RECORDS[2]]


def test_short_writes(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    written(tmp_path / "journal")
    assert read_records(tmp_path / "journal") == RECORDS


@pytest.mark.parametrize("dtype", ["f8", "f4", "u1", "u4", "i8", "u8"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 3), (1,)])
def test_arrays_keep_their_bits(dtype, shape):
    array = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)
    array = array.reshape(shape)
    again = unpack_array(pack_array(array))
    assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert unpack_array(pack_array(array.T)).tobytes() == np.ascontiguousarray(array.T).tobytes()
