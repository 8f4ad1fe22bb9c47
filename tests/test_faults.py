"""Merges that are killed, interrupted, or failed by the system: a sample of `python -m tests.faults.campaign`."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .faults import full_disk
from .faults.campaign import MERGES, ROOT, Campaign, compiler, quick_folder

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FEW = 3


@pytest.fixture(scope="module")
def campaign():
    with tempfile.TemporaryDirectory(dir=quick_folder()) as folder:
        campaign = Campaign(Path(folder))
        yield campaign
        campaign.close()


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("mode", ["kill", "power loss"])
def test_killed_at_some_calls(campaign, name, mode):
    campaign.at_every_call(name, mode, most=FEW)


@pytest.mark.parametrize("name", MERGES)
def test_killed_at_random_times(campaign, name):
    campaign.at_random_times(name, FEW)


def test_signals_at_random_times(campaign):
    campaign.at_random_times("two passes", FEW, signals=SIGNALS)


@pytest.mark.parametrize("name", ["layer by layer", "overwriting a bare file"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR])
def test_some_calls_fail(campaign, name, code):
    campaign.at_every_call(name, "error", code, most=FEW)


@pytest.mark.parametrize("name", ["two passes", "bare file"])
def test_disks_that_fill_up(campaign, name):
    campaign.at_every_call(name, "error from then on", errno.ENOSPC, most=FEW)


def test_short_writes(campaign):
    campaign.at_every_call("two passes", "short", most=FEW)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_systems_without_what_is_optional(campaign, code):
    campaign.without("two passes", code)


def test_the_faults_are_injected(campaign):
    """A shim that intercepts nothing would pass every other test."""
    for mode, at_least in {"kill": 30, "error": 30, "short": 5}.items():
        assert campaign.num_calls("two passes", mode) >= at_least
    campaign.prepare("two passes")
    assert campaign.merge("two passes", mode="error", call=20, errno=errno.EIO)["status"] == 1
    assert "Input/output error" in campaign.log.read_text()
    campaign.prepare("two passes")
    assert campaign.merge("two passes", mode="kill", call=20)["status"] == -signal.SIGKILL


def test_a_disk_that_is_really_full():
    if not full_disk.can_mount():
        pytest.skip("needs the right to mount a tmpfs")
    command = [*full_disk.PREFIX, sys.executable, "-m", "tests.faults.full_disk"]
    command += ["--merge", "two passes", "--step", "16384"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "full disks" in done.stdout
