"""Every figure of docs/reliability.md, by one command: `python -m tests.faults --help`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from metagpt_fast import __version__
from metagpt_fast.checkpoint import open_checkpoint
from metagpt_fast.errors import CheckpointError
from tests.hostile import BROKEN_FILES

from . import full_disk
from .campaign import ROOT, Campaign, everything, quick_folder

# How each kind of fault of the campaign is called in the table.
KINDS = {
    "killed": ("kill", "SIGKILL"),
    "power failures": ("power loss",),
    "interrupted (SIGINT, SIGTERM, SIGHUP)": ("SIGINT", "SIGTERM", "SIGHUP"),
    "failing calls (ENOSPC, EDQUOT, EIO, EINTR)": ("error ENOSPC", "error EDQUOT", "error EIO", "error EINTR"),
    "disks full from a call on": ("error from then on ENOSPC",),
    "short writes": ("short",),
    "file systems without what is optional": ("file systems without fallocate, copy_file_range and locks",),
    "disks that are really full": ("full disks",),
}


def tell(what: str) -> None:
    """Say on stderr what is being done."""
    print(what, file=sys.stderr, flush=True)


def break_merges(kills: int, most: int | None, seed: int) -> Counter[str]:
    """Run the campaign; return what was tried, and how it went on."""
    with tempfile.TemporaryDirectory(dir=quick_folder()) as folder:
        campaign = Campaign(Path(folder), seed)
        try:
            for what in everything(campaign, kills, most):
                tell(what)
        finally:
            campaign.close()
        return campaign.counts


def fill_disks(step: int) -> Counter[str]:
    """Merge on full disks, where this process may mount one."""
    if not full_disk.can_mount():
        tell("full disks: left out, mounting a tmpfs is not allowed here")
        return Counter()
    command = [*full_disk.PREFIX, sys.executable, "-m", "tests.faults.full_disk", "--step", str(step), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Counter(json.loads(done.stdout))


def fuzz_readers(seconds: float) -> dict[str, dict[str, Any]]:
    """Fuzz every reader; return the executions, how many files were accepted, and findings."""
    command = [sys.executable, str(ROOT / "tests/fuzz/run.py"), "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    for name, each in results.items():
        if each["finding"]:
            tell(f"FINDING in {name}: {each['finding']}")
    return results


def num_broken_files_refused() -> int:
    """Open each safetensors file that was broken by hand."""
    for each in BROKEN_FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            path.write_bytes(each.content)
            try:
                open_checkpoint(path)
            except CheckpointError:
                continue
            raise AssertionError(f"accepted: {each.label}")
    return len(BROKEN_FILES)


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills at random times, for each kind of merge")
    parser.add_argument("--most", type=int, help="most calls to hit for each fault and kind of merge; default all")
    parser.add_argument("--step", type=int, default=4096, help="bytes by which a full disk grows")
    parser.add_argument("--fuzz-seconds", type=float, default=60, help="for each of five readers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    counts = break_merges(arguments.kills, arguments.most, arguments.seed)
    counts += fill_disks(arguments.step)
    tell("readers of files from strangers")
    readers = fuzz_readers(arguments.fuzz_seconds)
    executions = sum(each["executions"] for each in readers.values())
    refused = executions - sum(each["accepted"] for each in readers.values())
    rows = [(kind, sum(counts[name] for name in names)) for kind, names in KINDS.items()]
    rows += [("all merges disturbed", sum(number for _, number in rows))]
    rows += [(f"of them {what}", counts[what]) for what in ("resumed", "begun again")]
    rows += [("fuzz executions", executions), ("of them refused", refused)]
    rows += [("safetensors files broken by hand, refused", num_broken_files_refused())]
    findings = sorted(name for name, each in readers.items() if each["finding"])
    verdict = f"findings in {', '.join(findings)}" if findings else "all survived"
    print(f"metagpt_fast {__version__}: {verdict}, in {(time.perf_counter() - started) / 60:.0f} min\n")
    print("| what was done to it | times |\n|---|---|")
    for what, number in rows:
        print(f"| {what} | {number:,} |")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
