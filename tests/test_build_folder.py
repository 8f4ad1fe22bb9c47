"""The folder an output is built in: one process at a time has it, and nobody takes another's for a leftover."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys

import pytest

from metagpt_fast._native import crc32c
from metagpt_fast.build_folder import BuildFolder, build_path, changed_parts
from metagpt_fast.errors import OutputError
from metagpt_fast.writer import CheckpointWriter, plan_shards

from .output_files import output_tensors, small, write, writer_for


def test_a_second_writer_is_refused(tmp_path):
    with writer_for(tmp_path / "out") as first:
        with pytest.raises(OutputError, match=f"another merge is writing.*process {os.getpid()} on "):
            write(tmp_path / "out", small())
        write(tmp_path / "other", small())
        assert first.slot("a").path.exists()
    write(tmp_path / "out", small())


def test_another_process_is_refused_until_this_one_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from metagpt_fast.build_folder import BuildFolder\n"
        "folder = BuildFolder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=f"by process {process.pid} on"):
            write(tmp_path / "out", small())
        process.kill()
        process.wait()
        write(tmp_path / "out", small())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between another process's look at the lock's name and its locking, the owner may finish."""
    target = tmp_path / "out"
    owner = BuildFolder(target)
    flock = fcntl.flock

    def finishing(fd, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        owner.remove()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finishing)
    second = BuildFolder(target)
    with pytest.raises(OutputError, match="another merge"):
        BuildFolder(target)
    assert (build_path(target) / "lock").exists()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def _lock_often(target, num_times, queue):
    num_locked = 0
    for _ in range(num_times):
        try:
            folder = BuildFolder(target)
        except OutputError:
            continue
        folder.clear()
        (folder.files / "alone").touch(exist_ok=False)
        num_locked += 1
        (folder.files / "alone").unlink()
        folder.remove()
    queue.put(num_locked)


def test_many_processes_never_meet(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_lock_often, args=(tmp_path / "out", 150, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum(queue.get() for _ in processes) > 0
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_locks(tmp_path, monkeypatch, caplog):
    def unsupported(fd, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write(tmp_path / "out", small())
    assert "do not start a second merge" in caplog.text


def test_what_could_not_be_deleted_is_deleted_by_the_next(tmp_path):
    (tmp_path / ".out.removing-0123abcd" / "files").mkdir(parents=True)
    (tmp_path / ".outer.removing-0123abcd").mkdir()
    write(tmp_path / "out", small())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outer.removing-0123abcd", "out"]


def test_names_with_odd_characters(tmp_path):
    for name in ("[a]*", "ü b", "x.safetensors"):
        write(tmp_path / name, small())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[a]*", "x.safetensors", "ü b"]


def test_a_job_is_resumed_only_by_itself(tmp_path):
    def work(job, *, resume, stop):
        with CheckpointWriter(tmp_path / "out", plan_shards(output_tensors(small()), 1), job=job, resume=resume) as w:
            left = [name for name in ("a", "b") if not w.is_written(name)]
            for name in left:
                slot = w.slot(name)
                os.pwrite(slot.fd, small()[name].tobytes(), slot.data_offset)
                w.wrote(name, 0, small()[name].nbytes, crc32c(small()[name].tobytes()))
                w.record({"fact": name}, [name])
                if stop:
                    raise KeyboardInterrupt
            w.finish()
            return left, [each["fact"] for each in w.records]

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        work({"dtype": "keep", "input": {"base": {"size": 1}}}, resume=True, stop=True)
    with pytest.raises(OutputError, match=r"interrupted merge to this output is there.*--resume.*rm -r"):
        work({"dtype": "keep", "input": {"base": {"size": 1}}}, resume=False, stop=False)
    with pytest.raises(OutputError, match="input: base: size was 1, now 2; extra was None, now 3"):
        work({"dtype": "keep", "input": {"base": {"size": 2}}, "extra": 3}, resume=True, stop=False)
    with pytest.raises(OutputError, match="interrupted merge"):
        write(tmp_path / "out", small())
    again = work({"dtype": "keep", "input": {"base": {"size": 1}}}, resume=True, stop=False)
    assert again == (["b"], ["a"])
    write(tmp_path / "expected", small(), limit=1)
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


@pytest.mark.parametrize("damage", ["missing", "longer", "header"])
def test_a_file_that_is_not_as_it_was_left_is_made_again(tmp_path, damage):
    shards = plan_shards(output_tensors(small()), 1)

    def interrupted():
        with CheckpointWriter(tmp_path / "out", shards, job={}, resume=True) as writer:
            for name, array in small().items():
                writer.wrote(name, 0, array.nbytes, 0)
                writer.record({}, [name])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    path = tmp_path / ".out.partial" / "files" / shards[0].file_name
    if damage == "missing":
        path.unlink()
    elif damage == "longer":
        os.truncate(path, shards[0].nbytes + 1)
    else:
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    with CheckpointWriter(tmp_path / "out", shards, job={}, resume=True) as writer:
        assert [writer.is_written(name) for name in ("a", "b")] == [False, True]
    assert list(tmp_path.iterdir()) == []


def test_changes_are_told_part_by_part():
    before = {"a": 1, "b": {"c": [1], "d": 2}, "gone": "x"}
    assert changed_parts(before, before) == []
    assert changed_parts(before, {"a": 1, "b": {"c": [2], "d": 2}, "new": None}) == [
        "b: c was [1], now [2]",
        "gone was 'x', now None",
    ]


def test_digests_are_not_shown():
    before, now = {"header": "0" * 64, "a": "ab12"}, {"header": "f" * 64, "a": "ab13"}
    assert changed_parts(before, now) == ["header: not the same", "a was 'ab12', now 'ab13'"]
