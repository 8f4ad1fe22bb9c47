"""Runs mergekit-yaml or mergekit-yaml-fast in this process and tells how long it took behind mergekit's planning.

python mergekit_phases.py ours|theirs PHASES.jsonl CONFIG OUT [OPTIONS]

Both plan by the same function of mergekit, at whose end the clock is read; the other reading is when the command is
done. A line is appended to the file: seconds in between, and the anonymous memory at the first reading, which holds
mergekit's imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(whose: str, phases: Path, arguments: list[str]) -> None:
    """Run the command and append what was read."""
    sys.argv[1:] = arguments
    found: dict[str, float] = {}
    if whose == "ours":
        from metagpt_fast.integrations import mergekit_cli as module

        module.gc.disable()  # as its main() begins: imports are slow with it
    else:
        import mergekit.scripts.run_yaml as module  # type: ignore[no-redef]
    from mergekit.plan import MergePlanner

    original = MergePlanner.plan_to_disk

    def plan_to_disk(self: MergePlanner, out_path: str) -> object:
        tasks = original(self, out_path)
        found["anonymous_nbytes"] = anonymous_nbytes()
        found["started"] = time.perf_counter()
        return tasks

    MergePlanner.plan_to_disk = plan_to_disk
    status = 0
    try:
        module.main()
    except SystemExit as end:
        status = int(end.code or 0)
    seconds = time.perf_counter() - found["started"]
    with phases.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": seconds, "anonymous_nbytes": found["anonymous_nbytes"]}) + "\n")
    sys.exit(status)


def anonymous_nbytes() -> int:
    """Return this process's RssAnon."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * 1024
    return 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
