"""Merges of a small family in every way there is, in one process; test_sanitizers.py runs it with a sanitizer inside.

    python tests/merge_everything.py FOLDER [--repeat 100]

With LeakSanitizer in the process, --repeat looks for memory that nothing refers to any more after so many merges more.
Prints how many merges ran; what a sanitizer finds ends the process.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind the package that is to be tested

import metagpt_fast as mf
from metagpt_fast import _native
from tests.checkpoints import random_states, tensor_bytes, write_family
from tests.kernel_calls import kernels
from tests.method_cases import CASES, DTYPES, SHAPES, merge


def ways(folder: Path) -> list[Callable[[], object]]:
    """Return merges to be run: every method, and every way of reading, granularity and instruction set."""
    base, models = write_family(folder / "in", random_states(5, DTYPES, SHAPES), num_shards=2, misalignment=3)
    out = folder / "out"

    def run(method: str, parameters: dict[str, object], isa: str = _native.isa(), **settings: object) -> None:
        with kernels(isa=isa):
            merge(base, models, out, method, parameters, threads=3, overwrite=True, sync=False, **settings)

    result: list[Callable[[], object]] = [
        lambda method=method, parameters=parameters: run(method, parameters) for method, parameters in CASES
    ]
    for isa, io, granularity in itertools.product(
        _native.supported_isas(), ("mmap", "pread"), ("model", "layer", "tensor")
    ):
        result.append(
            lambda isa=isa, io=io, granularity=granularity: run("metagpt", {}, isa, io=io, granularity=granularity)
        )
    result.append(lambda: mf.verify(out, full=True))
    result.append(lambda: mf.measure(base, models, threads=3))
    result.append(lambda: tensor_bytes(out))
    return result


def main() -> None:
    """Run everything, then as much more as was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, help="merges after the first of each kind")
    arguments = parser.parse_args()
    everything = ways(arguments.folder)
    for each in everything:
        each()
    print(f"{len(everything)} ways", Path(mf._core.__file__))
    if arguments.repeat:
        for each in itertools.islice(itertools.cycle(everything), arguments.repeat):
            each()
        process = ctypes.CDLL(None)
        has_leaks = process.__lsan_do_recoverable_leak_check()
        print(f"{arguments.repeat} more, {'leaks' if has_leaks else 'no leaks'}", flush=True)
        for _ in range(50):  # or nothing is ever found
            process.malloc(4321)
        print("lost memory is", "found" if process.__lsan_do_recoverable_leak_check() else "not found")


if __name__ == "__main__":
    main()
