"""The thread that writes the journal, where a signal meets it."""

from __future__ import annotations

import threading

import pytest

from metagpt_fast.journal import Journal, read_records
from metagpt_fast.recorder import Recorder


def interrupted_start(thread):
    raise KeyboardInterrupt


def test_a_signal_before_the_thread_has_started(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal")
    began = []
    recorder = Recorder(journal, began.append, began.append, began.append)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted_start)
        recorder.add({"n": 1}, ["a"])
    recorder.stop()
    journal.close()
    assert read_records(tmp_path / "journal") == []
    assert began == []
