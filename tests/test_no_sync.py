"""--no-sync: nothing waits for the disk, and what was done before another start of the system does not count."""

from __future__ import annotations

import os

import pytest

from metagpt_fast import jobs
from metagpt_fast.errors import OutputError

from .test_resume import Interrupter, family, files_of, merge, small_steps

__all__ = ["family", "small_steps"]  # fixtures


def test_nothing_waits_for_the_disk(family, tmp_path, monkeypatch):
    merge(family, tmp_path / "expected", "metagpt")
    calls = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *arguments: calls.append(arguments))
    merge(family, tmp_path / "out", "metagpt", sync=False)
    assert calls == []
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    merge(family, tmp_path / "out2", "metagpt")
    assert calls


def test_resumed_within_one_start_of_the_system_only(family, tmp_path, monkeypatch):
    merge(family, tmp_path / "expected", "metagpt")
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("first\n")
    monkeypatch.setattr(jobs, "_BOOT_ID", boot_id)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupter(patch, "_combine", at=4)
        merge(family, tmp_path / "out", "metagpt", sync=False)
    boot_id.write_text("second\n")
    for sync in (False, True):
        with pytest.raises(OutputError, match=r"start of the system \(--no-sync\) was 'first'"):
            merge(family, tmp_path / "out", "metagpt", sync=sync, resume=True)
    boot_id.write_text("first\n")
    report = merge(family, tmp_path / "out", "metagpt", sync=False, resume=True)
    assert report.num_resumed > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_without_a_boot_id_nothing_is_resumed(family, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_BOOT_ID", tmp_path / "missing")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupter(patch, "_combine", at=4)
        merge(family, tmp_path / "out", "metagpt", sync=False)
    with pytest.raises(OutputError, match="was 'unknown"):
        merge(family, tmp_path / "out", "metagpt", sync=False, resume=True)
