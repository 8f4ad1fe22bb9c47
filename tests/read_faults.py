"""Merges whose reads fail at the n-th call, for every n; run it with faulty_reads.so in LD_PRELOAD.

    python tests/read_faults.py FOLDER STEP

FOLDER gets the checkpoints and outputs; every STEP-th call is tried. Prints what happened, as JSON, and exits with 1 if
a merge did what it must not: crash, end with anything but an error that names an input, or give other bytes.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metagpt_fast as mf
from metagpt_fast.dtypes import BF16
from tests.checkpoints import integers, random_states, tensor_bytes, write_family

KINDS = {"EIO": 1, "EINTR": 2, "short": 3, "end of file": 4}
# What must not be noticed at all.
HARMLESS = {"EINTR", "short"}
WAYS = {
    "mmap": {"method": "metagpt", "io": "mmap", "exclude": "b"},
    "pread": {"method": "metagpt", "io": "pread", "exclude": "b"},
    "sparse": {"method": "ties", "io": "pread", "parameters": {"density": 0.5}},
    "rows": {"method": "model_stock", "io": "pread", "parameters": {"filter_wise": True}},
    "reference": {"backend": "reference", "io": "pread"},
    "verify": {},
}


def main() -> int:
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    shim = ctypes.CDLL(None)
    states = random_states(3, [(BF16,)] * 3, {"layers.0.a": (300, 40), "b": (5000,), "c": (77,)})
    for state in states:
        state["ids"] = integers(range(9))
    base, models = write_family(folder / "in", states, num_shards=2)
    mf.merge(base, models, folder / "merged", method="ties", parameters={"density": 0.5})
    counts: dict[str, int] = {}
    wrong: list[str] = []
    num_files = len(list(Path("/proc/self/fd").iterdir()))
    for way, settings in WAYS.items():
        expected = None
        if way != "verify":
            mf.merge(base, models, folder / "expected", **settings)
            expected = tensor_bytes(folder / "expected")
            shutil.rmtree(folder / "expected")
        for kind, code in KINDS.items():
            for lasting in (1, 1 << 40):
                if lasting > 1 and kind in HARMLESS and kind != "short":
                    continue  # an interruption that never ends
                n = 1
                while True:
                    shim.faulty_reads_arm(str(folder / "in").encode(), code, ctypes.c_long(n), ctypes.c_long(lasting))
                    outcome = attempt(shim, way, base, models, folder, settings, expected)
                    shim.faulty_reads_disarm()
                    num_faults = shim.faulty_reads_num_faults()
                    if num_faults == 0:
                        break
                    counts[f"{way}, {kind}: {outcome.split(':')[0]}"] = (
                        counts.get(f"{way}, {kind}: {outcome.split(':')[0]}", 0) + 1
                    )
                    if outcome.startswith("wrong") or (kind in HARMLESS and outcome != "same bytes"):
                        wrong.append(f"{way}, {kind} at call {n}, {lasting} times: {outcome}")
                    n += step
    left = len(list(Path("/proc/self/fd").iterdir())) - num_files
    if left:
        wrong.append(f"{left} files were left open")
    print(json.dumps({"num_faults": sum(counts.values()), "outcomes": counts, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def resume(base, models, folder, settings, expected, left, error) -> str:
    """Go on with a merge whose disk had failed: it has to come to the same bytes."""
    if left != [".out.partial"] or "--resume" not in str(error):
        return f"wrong: left {left} behind"
    try:
        mf.merge(base, models, folder / "out", resume=True, **settings)
    except mf.MetagptFastError as refused:
        return f"wrong: cannot be resumed: {refused}"
    same = tensor_bytes(folder / "out") == expected
    shutil.rmtree(folder / "out")
    return "resumed" if same else "wrong: other bytes after --resume"


def attempt(shim, way, base, models, folder, settings, expected) -> str:
    """Return what a merge, or a verification, did with its fault."""
    try:
        if way == "verify":
            report = mf.verify(folder / "merged", full=True)
            is_blamed = all(problem.kind == "input" for problem in report.problems)
            return "same bytes" if report.ok else "refused" if is_blamed else f"wrong: {report.problems}"
        mf.merge(base, models, folder / "out", **settings)
    except mf.MetagptFastError as error:
        shim.faulty_reads_disarm()
        left = [path.name for path in folder.iterdir() if path.name not in {"in", "merged"}]
        if str(folder / "in") not in str(error):
            return f"wrong: names no input: {error}"
        return "refused" if not left else resume(base, models, folder, settings, expected, left, error)
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {error}"
    same = tensor_bytes(folder / "out") == expected
    shutil.rmtree(folder / "out")
    return "same bytes" if same else "wrong: other bytes"


if __name__ == "__main__":
    sys.exit(main())
