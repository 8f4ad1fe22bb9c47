"""All that needs a GPU, in one command: build, test, compare with the CPU, measure. One JSON, and a table.

    python bench/gpu.py                     # under eight minutes; writes bench/results/gpu-<name>.json

It needs nvcc, a C++ compiler, NumPy, pytest, and for comparisons torch (whose copy of pybind11 does for the build) and
triton; no network, and nothing installed. Without a GPU it says so, and ends with status 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import re
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent), str(BENCH)]

from benchlib.gpu_build import BuildError, build_missing, run_tests  # noqa: E402

_SECONDS = 400  # after these, nothing optional is begun
_DEVICE_NBYTES = 128 << 20
# dtype, T, elements, tensors: the main figure, the same as thirty tensors, and every dtype and T.
_MAIN = [("bf16", 3, 200_000_000, 1), ("bf16", 3, 200_000_000, 30)]
_GRID = [(dtype, num_models, 64 << 20, 1) for dtype in ("bf16", "f16", "f32") for num_models in (1, 2, 3, 8)]


def main() -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU [0]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for 10 GB of files")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("-o", "--out", type=Path, help="the JSON [bench/results/, named by the GPU]")
    arguments = parser.parse_args()
    try:
        return _run(arguments)
    except BuildError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {what}", file=sys.stderr, flush=True)

    build_missing(tell)
    from metagpt_fast.backends.cuda_device import CudaDevice, list_devices, versions
    from metagpt_fast.errors import BackendError

    try:
        facts = list_devices()
        device = CudaDevice(arguments.device)
    except BackendError as error:
        raise BuildError(f"there is nothing to measure on: {error}") from error
    tested = "left out" if arguments.skip_tests else run_tests(tell)

    from benchlib.gpu_kernels import measure_kernels
    from benchlib.gpu_sparse import measure_sparse
    from benchlib.gpu_streaming import measure_streaming
    from benchlib.machine import commit, describe_machine, describe_versions
    from benchlib.rows import Result

    baselines = None
    if importlib.util.find_spec("torch") is not None:
        from benchlib.gpu_torch import make_baselines

        baselines = make_baselines(arguments.device, 10, started + _SECONDS, compiled=(3,))
    rows, wrong = [], []
    for case in (*_MAIN, *_GRID):
        if time.monotonic() - started > _SECONDS:
            tell(f"no time for {case}")
            continue
        tell("kernels: {} T={} numel={} tensors={}".format(*case))
        found = measure_kernels(device, [case], 20, baselines)
        rows += found[0]
        wrong += found[1]
    tell("streamed merge, from files to a file")
    found = measure_streaming(device, arguments.folder, 512 << 20, _DEVICE_NBYTES, 3)
    rows += found[0]
    wrong += found[1]
    if time.monotonic() - started < _SECONDS:
        tell("methods that prune, from files to a file, here and on the CPU")
        found = measure_sparse(CudaDevice(arguments.device), arguments.folder, 128 << 20, _DEVICE_NBYTES, 2)
        rows += found[0]
        wrong += found[1]
    machine = describe_machine(arguments.folder) | {"gpu": facts[arguments.device]}
    result = Result(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        commit=commit(),
        machine=machine,
        versions=describe_versions() | {f"cuda_{name}": version for name, version in versions().items()},
        settings={"tests": tested, "differs_from_cpu": wrong},
        rows=tuple(rows),
    )
    slug = re.sub(r"[^a-z0-9]+", "-", facts[arguments.device]["name"].lower()).strip("-")
    path = arguments.out or BENCH / "results" / f"gpu-{slug}.json"
    result.save(path)
    print_table(result.rows)
    print(f"tests: {tested}\nwritten: {path}")
    if wrong:
        print(f"NOT the CPU's result: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


def print_table(rows) -> None:
    """Print medians, one line per row, without any package's help."""
    columns = {
        "gb_per_s": "GB/s", "ceiling_gb_per_s": "ceiling", "percent_of_ceiling": "% of it",
        "speedup_torch": "x torch", "speedup_torch_compile": "x compiled",
        "speedup_cpu": "x CPU",
    }  # fmt: skip
    width = max((len(row.name) for row in rows), default=0)
    print(" " * width, *(f"{heading:>10}" for heading in columns.values()))
    for row in rows:
        cells = [f"{row.metrics[name].median:.4g}" if name in row.metrics else "" for name in columns]
        print(f"{row.name:{width}}", *(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
