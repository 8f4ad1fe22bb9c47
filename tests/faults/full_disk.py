"""Merges on disks that are really full, one page later each time. Needs the right to mount:

unshare --map-root-user --mount .venv/bin/python -m tests.faults.full_disk
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .campaign import MERGES, Campaign

PREFIX = ("unshare", "--map-root-user", "--mount")
PLENTY = 64 << 20


def can_mount() -> bool:
    """Return whether this machine lets a process of ours mount a tmpfs."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [*PREFIX, "mount", "-t", "tmpfs", "tmpfs", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mount(folder: Path, nbytes: int, *, again: bool = True) -> None:
    """Mount a tmpfs of this size, or give the one that is mounted another size."""
    how = f"{'remount,' * again}size={nbytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], check=True)


def on_full_disks(campaign: Campaign, name: str, step: int) -> None:
    """Merge on a disk that is too small for the output, then on larger ones until it is large enough."""
    mount(campaign.place, PLENTY)
    output = campaign.expected(name)
    campaign.prepare(name)
    campaign.merge(name)
    weights = sum((campaign.place / path).stat().st_size for path in output if path.endswith(".safetensors"))
    campaign.prepare(name)
    there = sum(path.stat().st_size for path in campaign.place.rglob("*") if path.is_file())
    size = there + weights - 2 * step
    statuses = []
    while not statuses or statuses[-1]:
        mount(campaign.place, PLENTY)
        campaign.prepare(name)
        mount(campaign.place, size)
        statuses.append(campaign.merge(name)["status"])
        mount(campaign.place, PLENTY)
        fault = f"a disk of {size} bytes"
        campaign.check(statuses[-1] in {0, 1}, name, fault, f"status {statuses[-1]}")
        if statuses[-1]:
            log = campaign.log.read_text(errors="replace")
            campaign.check("space" in log, name, fault, "a message that does not say what is missing")
        campaign.settle(name, fault, statuses[-1])
        campaign.counts["full disks"] += statuses[-1]
        size += step


def main() -> None:
    """Run all merges, or one, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merge", choices=list(MERGES), help="only this one")
    parser.add_argument("--step", type=int, default=4096, help="bytes by which the disk grows")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "work"
        place.mkdir()
        mount(place, PLENTY, again=False)
        campaign = Campaign(Path(folder))
        try:
            for name in [arguments.merge] if arguments.merge else MERGES:
                print(f"{name}: full disks", file=sys.stderr, flush=True)
                on_full_disks(campaign, name, arguments.step)
        finally:
            campaign.close()
            subprocess.run(["umount", place], check=True)
            lines = (f"{count:7,} {what}" for what, count in campaign.counts.items())
            print(json.dumps(campaign.counts) if arguments.json else "\n".join(lines))


if __name__ == "__main__":
    main()
