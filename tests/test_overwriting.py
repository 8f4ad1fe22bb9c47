"""Outputs that replace others: whatever happens on the way, one of the two is there, and whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import safetensors.numpy

from metagpt_fast import output_target
from metagpt_fast.errors import OutputError

from .output_files import small, write, writer_for


def test_overwriting(tmp_path):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}"), ("old.txt", b"")])
    with pytest.raises(OutputError, match="--overwrite"):
        write(out, small(2))
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    write(out, small(2), overwrite=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 2
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])
    with pytest.raises(KeyboardInterrupt), writer_for(out, overwrite=True):
        raise KeyboardInterrupt
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(params=["exchange", "two renames"])
def way_to_replace(request, monkeypatch):
    """Where the system cannot exchange two names, the old output is moved aside for a moment."""
    if request.param == "two renames":
        monkeypatch.setattr(output_target, "_exchange", lambda a, b: False)
    return request.param


def test_overwriting_either_way(tmp_path, way_to_replace):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}"), ("old.txt", b"")])
    write(out, small(2), overwrite=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_exchange_that_fails_leaves_the_old_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])

    def failing(a, b):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(output_target, "_exchange", failing)
    with pytest.raises(OutputError, match="Input/output"):
        write(out, small(2), overwrite=True)
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_a_process_killed_between_two_renames(tmp_path):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])
    build = tmp_path / ".out.partial"
    (build / "files").mkdir(parents=True)
    out.rename(build / "replaced")
    with pytest.raises(OutputError, match="--overwrite"):
        write(out, small(2))
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_output_returns_if_the_rename_fails(tmp_path, monkeypatch, failure):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])
    monkeypatch.setattr(output_target, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self, target):
        if self.name == "files":
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        write(out, small(2), overwrite=True)
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupt_right_after_the_rename_leaves_the_new_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])
    monkeypatch.setattr(output_target, "_exchange", lambda a, b: False)
    rename = Path.rename

    def interrupted(self, target):
        rename(self, target)
        if self.name == "files":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, small(2), overwrite=True)
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupt_right_after_the_old_output_was_moved_brings_it_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])
    monkeypatch.setattr(output_target, "_exchange", lambda a, b: False)
    rename = Path.rename

    def interrupted(self, target):
        rename(self, target)
        if target.name == "replaced":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, small(2), overwrite=True)
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_an_old_output_that_cannot_be_deleted_is_named(tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    write(out, small(1), files=[("metagpt_fast.json", b"{}")])

    def failing(path, **options):
        if not options:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", failing)
    write(out, small(2), overwrite=True)
    assert "delete it yourself" in caplog.text
    assert ".out.removing-" in caplog.text
    assert safetensors.numpy.load_file(out / "model.safetensors")["a"][0, 0] == 2


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def work():
        with writer_for(out) as writer:
            out.mkdir()
            (out / "theirs").write_text("x")
            writer.finish()

    with pytest.raises(OutputError, match="not empty"):
        work()
    assert [p.name for p in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def bare_file(tmp_path):
    out = tmp_path / "out.safetensors"
    write(out, small(1), files=[("metagpt_fast.json", b"1")])
    return out, tmp_path / "out.metagpt_fast.json"


def value_of(out):
    return safetensors.numpy.load_file(out)["a"][0, 0]


class Stop:
    """Fails, or interrupts, the n-th rename; looks at the output before each."""

    def __init__(self, monkeypatch, out, at, failure):
        self.seen = []
        self._left, self._failure = at, failure
        self._out, self._record = out, out.with_name("out.metagpt_fast.json")
        replace, exchange = Path.replace, output_target._exchange
        monkeypatch.setattr(Path, "replace", lambda path, target: self._count() or replace(path, target))
        monkeypatch.setattr(output_target, "_exchange", lambda a, b: self._count() or exchange(a, b))

    def _count(self):
        self.seen.append((value_of(self._out), self._record.read_bytes() if self._record.exists() else None))
        self._left -= 1
        if self._left == 0:
            raise self._failure


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_bare_file_never_has_the_record_of_another(tmp_path, monkeypatch, at, failure):
    out, record = bare_file(tmp_path)
    stop = Stop(monkeypatch, out, at, failure)
    try:
        write(out, small(2), overwrite=True, files=[("metagpt_fast.json", b"2")])
        assert at == 4
        assert (value_of(out), record.read_bytes()) == (2, b"2")
    except (OutputError, KeyboardInterrupt):
        assert at < 4
        assert (value_of(out), record.read_bytes()) == (1, b"1")
    assert set(stop.seen) <= {(1, b"1"), (1, None), (2, None), (2, b"2")}
    assert sorted(tmp_path.iterdir()) == [record, out]


def test_a_bare_file_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    out, record = bare_file(tmp_path)
    monkeypatch.setattr(output_target, "_exchange", lambda a, b: False)
    replace = Path.replace

    def failing(path, target):
        if path.name == record.name and path.parent.name == "files":
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(OutputError, match="Input/output"):
            write(out, small(2), overwrite=True, files=[("metagpt_fast.json", b"2")])
    assert value_of(out) == 2
    assert list(tmp_path.iterdir()) == [out]  # without a record rather than with one of other weights
    write(out, small(3), overwrite=True, files=[("metagpt_fast.json", b"3")])
    assert (value_of(out), record.read_bytes()) == (3, b"3")


def test_a_record_put_aside_by_a_process_that_was_killed_comes_back(tmp_path):
    out, record = bare_file(tmp_path)
    build = tmp_path / ".out.safetensors.partial"
    (build / "replaced_record").mkdir(parents=True)
    record.rename(build / "replaced_record" / record.name)
    with pytest.raises(OutputError, match="--overwrite"):
        write(out, small(2), files=[("metagpt_fast.json", b"2")])
    assert (value_of(out), record.read_bytes()) == (1, b"1")
    assert sorted(tmp_path.iterdir()) == [record, out]
