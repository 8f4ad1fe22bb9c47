"""Breaks merges at many points, and checks that nothing is lost: `python -m tests.faults.campaign --help`."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metagpt_fast.family import PRESETS, make_family

ROOT = Path(__file__).resolve().parents[2]
SHIM_SOURCE = Path(__file__).with_name("io_faults.c")
# What no two runs have in common.
VOLATILE = ("seconds", "seconds_measure", "seconds_combine", "nbytes_read", "nbytes_written", "num_resumed")

SMALL = {"window": 1 << 16, "record_seconds": 0.0}
METAGPT = ("--coefficients", "metagpt")
MERGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "two passes": (["--max-shard-size", "100kB", "--exclude", "lm_head"], SMALL),
    "layer by layer": (["--max-shard-size", "60kB", "--granularity", "layer"], SMALL),
    "one file": (["--method", "task_arithmetic", "--dtype", "f32"], SMALL),
    "sparse": (
        ["--method", "ties", "--set", "density=0.3", "--coefficients", "metagpt", "--granularity", "model"],
        SMALL,
    ),
    "overwriting": (["--overwrite", "--max-shard-size", "200kB"], SMALL),
    "bare file": (["--granularity", "tensor"], SMALL),
    "overwriting a bare file": (["--overwrite", "--granularity", "tensor"], SMALL),
}
OVERWRITING = frozenset({"overwriting", "overwriting a bare file"})
BARE_FILES = frozenset({"bare file", "overwriting a bare file"})


class NotSurvivedError(AssertionError):
    """A fault was not survived."""


def compiler() -> str | None:
    """Return a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def quick_folder() -> str | None:
    """Return a place where fsync takes no time, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def build_shim(folder: Path) -> Path:
    """Compile io_faults.c into ``folder``."""
    shim = folder / "io_faults.so"
    command = [
        compiler() or "cc",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        shim,
        SHIM_SOURCE,
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return shim


@dataclass
class Campaign:
    """One family, one worker, and what was tried."""

    folder: Path
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.inputs = self.folder / "in"
        self.place = self.folder / "work"
        self.log = self.folder / "log"
        shim = build_shim(self.folder)
        preset = PRESETS["tiny"]
        make_family(self.inputs, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
        self._input_digests = digests(self.inputs)
        self._worker = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(shim), "METAGPT_FAST_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        self._expected: dict[str, dict[str, str]] = {}
        self._old: dict[str, dict[str, str]] = {}  # what is there before a merge

    def close(self) -> None:
        """End the worker."""
        with self._worker:  # closes its pipes, and waits
            pass

    def merge(self, name: str, *more: str, **fault: Any) -> dict[str, Any]:
        """Run a merge with a fault; return the child's status and the number of calls counted."""
        options, settings = MERGES[name]
        base, *models = (str(self.inputs / each) for each in ("base", "chat", "math", "code"))
        arguments = ["merge", base, *models, "-o", str(self.out(name)), "-q", *options, *more]
        case = {"arguments": arguments, "below": str(self.place), "log": str(self.log), **settings, **fault}
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps(case) + "\n")
        self._worker.stdin.flush()
        answer: dict[str, Any] = json.loads(self._worker.stdout.readline())
        return answer

    def out(self, name: str) -> Path:
        """Return where a merge writes."""
        return self.place / ("out.safetensors" if name in BARE_FILES else "out")

    def prepare(self, name: str) -> None:
        """Empty the place; where a merge overwrites, put an old model there."""
        self.place.mkdir(exist_ok=True)
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if name == "overwriting":
            shutil.copytree(self.inputs / "base", self.out(name))
        elif name in OVERWRITING:
            shutil.copy(next((self.inputs / "base").glob("*.safetensors")), self.out(name))
            (self.place / "out.metagpt_fast.json").write_text("{}")

    def expected(self, name: str) -> dict[str, str]:
        """Return the digests of an undisturbed output."""
        if name not in self._expected:
            self.prepare(name)
            status = self.merge(name)["status"]
            self.check(status == 0, name, "undisturbed", f"status {status}")
            self._expected[name] = digests(self.place)
            self.prepare(name)
            self._old[name] = digests(self.place)
        return self._expected[name]

    def num_calls(self, name: str, mode: str) -> int:
        """Return how many calls an undisturbed merge makes that can be hit."""
        self.expected(name)
        self.prepare(name)
        return int(self.merge(name, mode=mode, call=1 << 40)["calls"])

    def check(self, is_right: bool, name: str, fault: object, problem: object) -> None:
        """Raise NotSurvivedError, with everything there is to know, unless ``is_right``."""
        if not is_right:
            log = self.log.read_text(errors="replace")
            tree = sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*"))
            raise NotSurvivedError(f"{name}, {fault}: {problem}\n{log}\n{tree}")

    def settle(self, name: str, fault: object, status: int, before: dict[str, str] | None = None) -> None:
        """Check what a disturbed merge left, resume it, and compare; ``before`` is what an earlier one had left."""
        expected = self.expected(name)
        log = self.log.read_text(errors="replace")
        self.check("Traceback" not in log, name, fault, "a traceback")
        left = digests(self.place)
        visible = {path: digest for path, digest in left.items() if not path.startswith(".")}
        is_whole = visible == expected
        is_right = is_whole or visible == self._old[name] or (status < 0 and self._is_between(name, visible))
        self.check(is_right, name, fault, f"half an output: {sorted(visible)}")
        hidden = {path for path in left if path.startswith(".")}
        if status == 0:
            self.check(is_whole and not hidden, name, fault, f"success without an output, or with {hidden}")
        elif status > 0 and not is_whole:
            is_told = "--resume" in log or not hidden or _without_lock(left) == _without_lock(before or {})
            self.check(is_told, name, fault, f"left behind without a word: {sorted(hidden)}")
            self.counts["kept to be resumed" if hidden else "nothing left"] += 1
        if not is_whole:
            end = self.merge(name, "--resume")
            self.check(end["status"] == 0, name, fault, f"resuming ended with status {end['status']}")
            record = "*/*fast.json" if self.out(name).is_dir() else "*fast.json"
            report = json.loads(next(self.place.glob(record)).read_bytes())
            self.counts["resumed" if report["num_resumed"] else "begun again"] += 1
        elif hidden:  # killed between the rename and the end: the next merge to this place cleans up
            self.merge(name, "--resume", "--overwrite")
        left = digests(self.place)
        different = sorted(path for path in {*left, *expected} if left.get(path) != expected.get(path))
        self.check(left == expected, name, fault, f"not the undisturbed output: {different}")
        self.check(digests(self.inputs) == self._input_digests, name, fault, "inputs changed")

    def _is_between(self, name: str, visible: dict[str, str]) -> bool:
        """Whether this is what a kill between two renames may leave: one of two files, and it is a right one."""
        if name == "bare file":
            return visible == {path: it for path, it in self._expected[name].items() if path != "out.safetensors"}
        states = (self._old[name], self._expected[name]) if name in BARE_FILES else ()
        return any(visible == {"out.safetensors": state["out.safetensors"]} for state in states)

    def at_every_call(self, name: str, mode: str, code: int = 0, *, most: int | None = None) -> None:
        """Hit every call (or ``most`` of them, by chance), one merge for each."""
        num_calls = self.num_calls(name, mode)
        calls = list(range(1, num_calls + 1))
        if most is not None and len(calls) > most:
            calls = sorted(self.random.sample(calls, most))
        for call in calls:
            self.prepare(name)
            fault = f"{mode} {errno.errorcode.get(code, '')} at call {call} of {num_calls}"
            status = self.merge(name, mode=mode, call=call, errno=code)["status"]
            self.counts[f"{mode} {errno.errorcode.get(code, '')}".strip()] += 1
            if mode == "short" or code == errno.EINTR:
                self.check(status in {0, 1}, name, fault, f"status {status}")
            self.settle(name, fault, status)

    def without(self, name: str, code: int) -> None:
        """Merge where the file system has no fallocate, copy_file_range and locks, and says so with ``code``."""
        self.expected(name)
        self.prepare(name)
        status = self.merge(name, mode="unsupported", errno=code)["status"]
        self.check(status == 0, name, f"{errno.errorcode[code]} for what is optional", f"status {status}")
        self.settle(name, f"{errno.errorcode[code]} for what is optional", status)
        self.counts["file systems without fallocate, copy_file_range and locks"] += 1

    def at_random_times(self, name: str, how_often: int, *, signals: tuple[int, ...] = (signal.SIGKILL,)) -> None:
        """Send a signal after a random time, up to that of a whole merge; sometimes again while it is resumed."""
        self.expected(name)
        seconds = []
        for _ in range(3):
            self.prepare(name)
            started = time.perf_counter()
            self.merge(name)
            seconds.append(time.perf_counter() - started)
        for _ in range(how_often):
            self.prepare(name)
            fault = ""
            more: tuple[str, ...] = ()
            before: dict[str, str] | None = None
            while True:
                after, signum = self.random.uniform(0.0, 1.1 * max(seconds)), self.random.choice(signals)
                fault += f"{signal.Signals(signum).name} after {after:.4f} s; "
                status = self.merge(name, *more, seconds=after, signal=signum)["status"]
                self.counts[signal.Signals(signum).name] += 1
                if status == 0 or self.random.random() < 0.7:
                    break
                more, before = ("--resume",), digests(self.place)
            self.settle(name, fault, status, before)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file below ``folder``; what differs between any two runs is left out."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name.endswith("metagpt_fast.json") and content.endswith(b"}\n"):
                report = json.loads(content)
                content = json.dumps({key: value for key, value in report.items() if key not in VOLATILE}).encode()
            result[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return result


def _without_lock(left: dict[str, str]) -> dict[str, str]:
    """Leave out which process had the folder last."""
    return {path: digest for path, digest in left.items() if not path.endswith("/lock")}


def everything(campaign: Campaign, kills: int, most: int | None) -> Iterator[str]:
    """Run all there is; yield what is being done."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR)
    faults = [("kill", 0), ("power loss", 0), *(("error", code) for code in codes)]
    faults += [("error from then on", errno.ENOSPC), ("short", 0)]
    for name in MERGES:
        for mode, code in faults:
            yield f"{name}: {mode} {errno.errorcode.get(code, '')}"
            campaign.at_every_call(name, mode, code, most=most)
        for code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            campaign.without(name, code)
        yield f"{name}: killed at random times"
        campaign.at_random_times(name, kills)
        yield f"{name}: signals at random times"
        campaign.at_random_times(name, kills // 4, signals=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def main() -> None:
    """Run the campaign and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="random times to be killed at, for each kind of merge")
    parser.add_argument("--most", type=int, help="most calls to hit for each fault; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=quick_folder(), help="where to work")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        campaign = Campaign(Path(folder), arguments.seed)
        try:
            for what in everything(campaign, arguments.kills, arguments.most):
                print(what, file=sys.stderr, flush=True)
        finally:
            campaign.close()
            for what, count in campaign.counts.items():
                print(f"{count:7,} {what}")
    print(f"all survived, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
