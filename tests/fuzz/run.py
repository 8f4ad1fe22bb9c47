"""Fuzz the readers of files from strangers; see docs/verifying.md.

    python tests/fuzz/run.py                         # every target, 1,000 files each: what the tests do
    python tests/fuzz/run.py header --seconds 600    # one target, for longer
    python tests/fuzz/run.py recipe --atheris --seconds 600 --keep FOLDER

Files are mutated from the corpus beside this program. With --atheris (pip install atheris) mutations are guided by the
coverage of the package, and new files that reach new code are put into FOLDER. Prints JSON; after a finding the status
is 1, and the file that caused it is left in the current folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "corpus"
NUM_FILES = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="header, index, recipe, measurement, record")
    parser.add_argument("--seconds", type=float, help="how long for each target, instead of 1,000 files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--keep", type=Path, help="with --atheris: folder for new files")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        run = fuzz_with_atheris if arguments.atheris else fuzz
        return run(arguments.targets[0], arguments.seconds, arguments.seed)
    summary = {}
    for name in arguments.targets or sorted(path.name for path in CORPUS.iterdir()):
        summary[name] = run_apart(name, arguments)
    print(json.dumps(summary, indent=1))
    return 1 if any(each["finding"] for each in summary.values()) else 0


def run_apart(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one target in a process of its own, whose memory is limited, and which may die."""
    command = [sys.executable, str(Path(__file__)), name, "--in-process", f"--seed={arguments.seed}"]
    if arguments.seconds:
        command.append(f"--seconds={arguments.seconds}")
    with tempfile.TemporaryDirectory(prefix="metagpt-fast-fuzz-") as folder:
        corpus = Path(arguments.keep or folder).resolve() / name
        environment = os.environ | {"TMPDIR": folder, "FUZZ_CORPUS": str(corpus)}
        if not arguments.atheris:
            finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            try:
                result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
            except (ValueError, IndexError):
                result = {"finding": f"the process ended with status {finished.returncode}"}
            return result
        corpus.mkdir(parents=True, exist_ok=True)
        before = set(os.listdir(corpus))  # noqa: PTH208
        finished = subprocess.run(
            [*command, "--atheris"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        number = re.search(r"stat::number_of_executed_units:\s*(\d+)", finished.stderr)
        covered = re.findall(r"cov: (\d+)", finished.stderr)
        return {
            "executions": int(number[1]) if number else 0,
            "edges": int(covered[-1]) if covered else 0,
            "new_files": len(set(os.listdir(corpus)) - before),  # noqa: PTH208
            "finding": finished.stderr[-3000:] if finished.returncode else None,
        }


def fuzz(name: str, seconds: float | None, seed: int) -> int:
    """Call a target with the corpus, then with mutations of it; print one line of JSON."""
    from tests.fuzz.mutations import mutate
    from tests.fuzz.targets import TARGETS, guarded

    here, folder = Path.cwd(), Path(tempfile.mkdtemp())
    target = TARGETS[name](folder)
    seeds = seeds_of(name, target)
    rng = random.Random(f"{seed} {name}")
    num_accepted = number = 0
    finding: str | None = None
    content = b""
    for content in seeds:  # what the package imports and compiles at first use
        target(content)
    started = time.monotonic()
    with guarded(folder) as call:
        try:
            while time.monotonic() - started < seconds if seconds else number < NUM_FILES + len(seeds):
                content = seeds[number] if number < len(seeds) else mutate(name, rng, rng.choice(seeds), seeds)
                num_accepted += call(target, content)
                number += 1
        except BaseException:
            finding = traceback.format_exc()[-3000:]
            keep_finding(here / f"finding-{name}-{hashlib.sha1(content).hexdigest()[:12]}", content)
        elapsed = time.monotonic() - started
    result = {"executions": number, "accepted": num_accepted, "seconds": round(elapsed, 1), "finding": finding}
    print(json.dumps(result))
    return 1 if finding else 0


def fuzz_with_atheris(name: str, seconds: float | None, seed: int) -> int:
    """Let libFuzzer choose: its own mutations, and half of the time ours."""
    import atheris

    with atheris.instrument_imports(include=["metagpt_fast"]):
        from tests.fuzz.mutations import mutate
        from tests.fuzz.targets import TARGETS, guarded
    here, folder = Path.cwd(), Path(tempfile.mkdtemp())
    target = TARGETS[name](folder)
    seeds = seeds_of(name, target)
    for content in seeds:
        target(content)
    corpus = Path(os.environ["FUZZ_CORPUS"])
    for content in seeds:
        (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)

    def change(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(name, rng, bytes(data), seeds)[:max_size]

    options = [
        f"-max_total_time={int(seconds or 10)}", f"-seed={seed}", "-max_len=65536", "-print_final_stats=1",
        "-rss_limit_mb=0", "-timeout=60", f"-artifact_prefix={here}/finding-{name}-",
    ]  # fmt: skip
    with guarded(folder) as call:
        atheris.Setup(
            [sys.argv[0], *options, str(corpus)], lambda data: call(target, data) and None, custom_mutator=change
        )
        atheris.Fuzz()
    return 0


def seeds_of(name: str, target: Any) -> list[bytes]:
    """The corpus, in a fixed order; for the record also what a merge of this version writes."""
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    return seeds + ([target.seed] if hasattr(target, "seed") else [])


def keep_finding(path: Path, content: bytes) -> None:
    """Write down the file that caused a finding."""
    path.write_bytes(content)
    print(f"left {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
