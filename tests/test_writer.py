"""The files that are written: readable by safetensors, whole or absent, with ordinary permissions."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open

from metagpt_fast.dtypes import BF16, F32
from metagpt_fast.errors import OutputError
from metagpt_fast.writer import CheckpointWriter, OutputTensor, plan_shards

from .output_files import make_arrays, output_tensors, small, write, writer_for


def read_raw(path):
    """Every tensor as dtype, shape and bytes, by nothing but the format's definition."""
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], content[slice(*(data + o for o in entry["data_offsets"]))])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
def test_tensors_equal_those_of_safetensors_own_writer(tmp_path, limit):
    arrays = make_arrays()
    shards = write(tmp_path / "out", arrays, limit=limit)
    # Its NumPy interface cannot write all of these dtypes, its torch interface can.
    theirs = {}
    for name, array in arrays.items():
        if array.dtype in (np.bool_, np.int64, np.int32, np.uint8, np.float16, np.float32, np.float64):
            theirs[name] = torch.from_numpy(array.copy())
        else:
            bits = torch.from_numpy(array.view(f"u{array.dtype.itemsize}").copy())
            torch_names = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
            theirs[name] = bits.view(torch_names.get(array.dtype.name, torch.bfloat16))
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    expected = read_raw(tmp_path / "theirs.safetensors")
    ours = {}
    for shard in shards:
        path = tmp_path / "out" / shard.file_name
        assert path.stat().st_size == shard.nbytes
        ours |= read_raw(path)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {t.name for t in shard.tensors}
            assert file.metadata() == {"format": "pt"}
            for tensor in shard.tensors:
                read = file.get_tensor(tensor.name)
                assert read.dtype == theirs[tensor.name].dtype
                assert read.shape == theirs[tensor.name].shape
                assert torch.equal(read.float(), theirs[tensor.name].float())
    assert ours == expected


def test_the_index(tmp_path):
    arrays = small()
    shards = write(tmp_path / "out", arrays, limit=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 + 8
    assert index["weight_map"] == {"a": shards[0].file_name, "b": shards[1].file_name}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_one_shard_has_no_index(tmp_path):
    write(tmp_path / "out", small())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_bare_file(tmp_path):
    out = tmp_path / "merged.v2.safetensors"
    write(out, small(), files=[("metagpt_fast.json", b"{}")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.v2.metagpt_fast.json", out.name]
    assert safetensors.numpy.load_file(out)["a"].tolist() == small()["a"].tolist()
    with pytest.raises(OutputError, match="--overwrite"):
        write(out, small(2))
    write(out, small(2), overwrite=True, files=[("metagpt_fast.json", b"{2}")])
    assert safetensors.numpy.load_file(out)["a"].tolist() == small(2)["a"].tolist()
    assert (tmp_path / "merged.v2.metagpt_fast.json").read_bytes() == b"{2}"
    with pytest.raises(ValueError, match="2 shards"):
        CheckpointWriter(tmp_path / "x.safetensors", plan_shards(output_tensors(small()), 1))


def test_a_link_to_a_file_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    other = tmp_path / "other"
    other.write_text("precious")
    link = tmp_path / "out.safetensors"
    link.symlink_to(other)
    write(link, small(), overwrite=True)
    assert other.read_text() == "precious"
    assert not link.is_symlink()


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    disk = tmp_path / "big disk" / "out"
    disk.mkdir(parents=True)
    (tmp_path / "out").symlink_to(disk)
    write(tmp_path / "out", small())
    assert (disk / "model.safetensors").is_file()
    assert (tmp_path / "out").is_symlink()


def test_extra_files(tmp_path):
    source = tmp_path / "template.jinja"
    source.write_text("hello")
    source.chmod(0o400)
    (tmp_path / "link").symlink_to(source)
    write(
        tmp_path / "out",
        small(),
        files=[("config.json", b"{}"), ("additional_chat_templates/tool.jinja", tmp_path / "link")],
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    copied = tmp_path / "out" / "additional_chat_templates" / "tool.jinja"
    assert copied.read_text() == "hello"
    assert not copied.is_symlink()
    assert copied.stat().st_mode & 0o200


def test_extra_files_never_replace_a_shard(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        with pytest.raises(OutputError, match=r"model\.safetensors.*exists"):
            writer.add_file("model.safetensors", b"")
        with pytest.raises(OutputError, match=r"vocab\.txt.*No such file"):
            writer.add_file("vocab.txt", tmp_path / "missing")


def test_slots_can_be_read_and_are_not_inherited(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        slot = writer.slot("a")
        assert not os.get_inheritable(slot.fd)
        assert os.pread(slot.fd, 24, slot.data_offset) == bytes(24)
        assert slot.path.stat().st_blocks * 512 >= slot.path.stat().st_size
        with pytest.raises(KeyError):
            writer.slot("c")


@pytest.mark.parametrize("umask, folder_mode, file_mode", [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, folder_mode, file_mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "out", small(), files=[("config.json", b"{}")])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == file_mode


def test_an_existing_folder_keeps_its_permissions(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o750)
    write(tmp_path / "out", small(), files=[("metagpt_fast.json", b"{}")])
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    write(tmp_path / "out", small(), overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, None])
def test_nothing_stays_without_finish(tmp_path, name, failure):
    def work():
        with writer_for(tmp_path / name) as writer:
            writer.add_file("metagpt_fast.json", b"{}")
            (staging,) = tmp_path.iterdir()
            assert staging.name == f".{name}.partial"
            if failure is not None:
                raise failure

    if failure is None:
        work()
    else:
        with pytest.raises(failure):
            work()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from metagpt_fast.dtypes import F32\n"
        "from metagpt_fast.writer import CheckpointWriter, OutputTensor, plan_shards\n"
        "shards = plan_shards([OutputTensor('a', F32, (9,)), OutputTensor('b', F32, (9,))], 1)\n"
        "with CheckpointWriter(Path(sys.argv[1]), shards) as writer:\n"
        "    writer.add_file('config.json', b'{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == ".out.partial"
    assert not list(leftover.rglob("*.index.json"))
    write(tmp_path / "out", small())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not leftover.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_found_at_once(tmp_path, monkeypatch, code):
    def full(fd, offset, length):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as caught, writer_for(tmp_path / "out"):
        pass
    assert os.strerror(code) in caught.value.what
    assert caught.value.got.endswith("free")
    assert caught.value.expected == "4.13 kB"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_reservation(tmp_path, monkeypatch, code):
    def unsupported(fd, offset, length):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with writer_for(tmp_path / "other") as writer:
        slot = writer.slot("a")
        assert os.pread(slot.fd, 24, slot.data_offset) == bytes(24)
    write(tmp_path / "out", small())
    assert safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")["b"].tolist() == [1.0] * 4


@pytest.mark.parametrize("code, hint", [(errno.EFBIG, "smaller"), (errno.EMFILE, "larger"), (errno.EIO, "")])
def test_other_failures_of_the_system(tmp_path, monkeypatch, code, hint):
    def failing(fd, offset, length):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", failing)
    with pytest.raises(OutputError) as caught, writer_for(tmp_path / "out"):
        pass
    assert os.strerror(code) in caught.value.what
    assert hint in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_missing_parent(tmp_path):
    with pytest.raises(OutputError, match="No such file"), writer_for(tmp_path / "no" / "out"):
        pass


def test_descriptors_are_closed(tmp_path):
    before = set(Path("/proc/self/fd").iterdir())
    write(tmp_path / "out", make_arrays(), limit=1)
    with writer_for(tmp_path / "other"):
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_failing_close_is_an_error(tmp_path):
    # Network file systems report a full quota here.
    def work():
        with writer_for(tmp_path / "out") as writer:
            os.close(writer.slot("a").fd)
            writer.finish()

    with pytest.raises(OutputError, match="cannot close"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_header_longer_than_one_write(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    shards = plan_shards([OutputTensor("a", F32, (1,)), OutputTensor("b", BF16, (1,))], 10**9)
    with CheckpointWriter(tmp_path / "out", shards) as writer:
        writer.finish()
    assert (tmp_path / "out" / "model.safetensors").read_bytes().startswith(shards[0].header)
