"""What is refused as an output before any work, and what overwriting may delete."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from metagpt_fast import output_target
from metagpt_fast.errors import OutputError
from metagpt_fast.output_target import check_target


def check(target, *, nbytes_needed=1, inputs=(), overwrite=False):
    check_target(Path(target), nbytes_needed=nbytes_needed, inputs=inputs, overwrite=overwrite)


def refused(target, **arguments) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check(target, **arguments)
    return caught.value


def make_model(folder, *names):
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).write_text("x")
    return folder


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "inputs" / "base")


def test_new_names_are_fine(tmp_path, base):
    check(tmp_path / "out", inputs=[base])
    check(tmp_path / "out.safetensors", inputs=[base])
    check(base.parent / "out", inputs=[base])
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", inputs=[base])


def test_existing_output_needs_overwrite(tmp_path):
    out = make_model(tmp_path / "out")
    assert "--overwrite" in refused(out).hint
    check(out, overwrite=True)
    file = tmp_path / "one.safetensors"
    file.write_text("x")
    assert "--overwrite" in refused(file).hint
    check(file, overwrite=True)
    link = tmp_path / "dangling.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    assert "--overwrite" in refused(link).hint


def test_the_record_beside_a_bare_file_counts_as_output(tmp_path):
    (tmp_path / "one.metagpt_fast.json").write_text("{}")
    assert refused(tmp_path / "one.safetensors").where.endswith("one.metagpt_fast.json")
    check(tmp_path / "one.safetensors", overwrite=True)


def test_a_plain_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for overwrite in (False, True):
        assert "existing file" in refused(tmp_path / "notes.txt", overwrite=overwrite).what


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "one.safetensors").mkdir()
    for overwrite in (False, True):
        assert "folder" in refused(tmp_path / "one.safetensors", overwrite=overwrite).what


@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_are_never_the_output(tmp_path, base, overwrite):
    def problem(target, *inputs):
        return refused(target, inputs=inputs, overwrite=overwrite).what

    assert "is one of the inputs" in problem(base, base)
    assert "lies inside" in problem(base / "merged", base)
    assert "lies inside" in problem(base / "deep" / "er" / "merged", base)
    assert "contains" in problem(base.parent, base)
    # The same through links, of the target and of the input.
    link = tmp_path / "link"
    link.symlink_to(base)
    assert "is one of the inputs" in problem(link, base)
    assert "is one of the inputs" in problem(base, link)
    assert "lies inside" in problem(link / "merged", base)
    assert "lies inside" in problem(base / "merged", link)
    assert "contains" in problem(base.parent, link)
    # Bare files: the file itself and folders above it, but not its neighbours.
    file = base / "model.safetensors"
    assert "is one of the inputs" in problem(file, file)
    assert "contains" in problem(base, file)
    check(base / "other.safetensors", inputs=[file], overwrite=overwrite)


def test_a_folder_that_only_holds_the_inputs_weights_is_kept(tmp_path):
    # As in a Hugging Face cache: the checkpoint's files are links to another folder.
    blobs = make_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blobs / "model.safetensors")
    assert "contains" in refused(blobs, inputs=[snapshot], overwrite=True).what
    target = blobs / "model.safetensors"
    assert "is one of the inputs" in refused(target, inputs=[snapshot], overwrite=True).what


def test_inputs_relative_to_the_current_folder(tmp_path, base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert "is one of the inputs" in refused("base", inputs=[Path("base")]).what
    assert "lies inside" in refused("base/out", inputs=[Path("../inputs/base")]).what
    check("out", inputs=[Path("base")])


@pytest.mark.parametrize(
    "names",
    [
        ("thesis.tex",),
        ("config.json", "main.js"),  # a program
        ("one.safetensors", "two.safetensors"),  # somebody's collection of checkpoints
    ],
)
def test_overwrite_spares_what_is_no_model_folder(tmp_path, names):
    folder = make_model(tmp_path / "folder", *names)
    assert "does not look like a model" in refused(folder, overwrite=True).what


def test_overwrite_spares_folders_that_hold_more_than_a_model(tmp_path):
    folder = make_model(tmp_path / "run")
    (folder / ".cache").mkdir()
    check(folder, overwrite=True)
    (folder / "checkpoint-500").mkdir()
    assert "checkpoint-500" in refused(folder, overwrite=True).got


def test_overwrite_takes_own_output_without_config(tmp_path):
    check(make_model(tmp_path / "out", "metagpt_fast.json", "model.safetensors"), overwrite=True)


def test_places_in_use_are_spared_even_if_they_look_like_a_model(tmp_path, monkeypatch):
    home = make_model(tmp_path / "users" / "me")
    monkeypatch.setenv("HOME", str(home))
    assert "home" in refused(home, overwrite=True).what
    assert "home" in refused(home.parent, overwrite=True).what
    here = make_model(tmp_path / "here")
    monkeypatch.chdir(here)
    assert "current folder" in refused(".", overwrite=True).what
    assert "current folder" in refused(here, overwrite=True).what
    assert "mount point" in refused("/", overwrite=True).what
    assert refused("/proc").what == "the output is a mount point, which cannot be replaced"


def test_missing_parent(tmp_path):
    error = refused(tmp_path / "a b" / "out")
    assert error.hint == f"make it with: mkdir -p '{tmp_path}/a b'"
    (tmp_path / "file").write_text("x")
    assert "file" in refused(tmp_path / "file" / "out").what


def test_parent_without_permission(tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    error = refused(tmp_path / "out")
    assert "not writable" in error.what
    assert error.got == "no write permission"


def test_read_only_file_system(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    fake = namedtuple("fake", "f_flag")(real.f_flag | os.ST_RDONLY)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: fake)
    assert refused(tmp_path / "out").got == "a read-only file system"


def test_free_space(tmp_path, monkeypatch):
    fake = namedtuple("fake", "f_bavail f_frsize f_blocks")
    monkeypatch.setattr(os, "statvfs", lambda path: fake(1000, 4096, 5000))
    check(tmp_path / "out", nbytes_needed=4_096_000)
    error = refused(tmp_path / "out", nbytes_needed=5_000_000_000)
    assert error.got == "4.10 MB free"
    assert error.expected.startswith("5.00 GB")
    assert "old output" not in error.hint
    out = make_model(tmp_path / "out")
    error = refused(out, nbytes_needed=4_096_001, overwrite=True)
    assert "old output does not count" in error.hint
    # What an interrupted merge has reserved is used again.
    (tmp_path / ".out.partial" / "files").mkdir(parents=True)
    (tmp_path / ".out.partial" / "files" / "model.safetensors.part").write_bytes(b"x" * 100_000)
    check(out, nbytes_needed=4_096_000 + 100_000, overwrite=True)
    refused(out, nbytes_needed=4_300_000, overwrite=True)
    # Some network file systems report no size at all.
    monkeypatch.setattr(os, "statvfs", lambda path: fake(0, 4096, 0))
    check(tmp_path / "new", nbytes_needed=10**15)


def test_errors_of_the_system_are_not_tracebacks(tmp_path, monkeypatch):
    assert "shorter name" in refused(tmp_path / ("x" * 300)).hint

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(output_target, "real_target", denied)
    assert "Permission denied" in refused(tmp_path / "out").what


def test_a_user_without_home(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 1_234_567)
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty")
