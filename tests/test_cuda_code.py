"""What nvcc makes of the CUDA kernels: no spills, no local memory, registers, 16-byte loads, no contraction."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from .tools import ROOT, run_checked

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

SOURCE = "csrc/cuda/kernels.cu"
# One of each kind of those that CMakeLists.txt compiles for; the build compiles all.
ARCHITECTURES = ("80", "90", "120")
KERNELS = {
    "gram_uniform_kernel": 15,  # dtypes x numbers of operands
    "gram_general_kernel": 1,
    "gram_fp64_kernel": 1,
    "gram_tensor_kernel": 1,
    "span_sums_kernel": 1,
    "merge_uniform_kernel": 3,
    "merge_general_kernel": 1,
    "count_keys_kernel": 4,  # what is counted
    "moments_block_kernel": 1,
    "moments_tensor_kernel": 1,
    "elect_kernel": 1,
    "ranked_rows_kernel": 1,
    "pack_bits_kernel": 1,
    "column_gram_kernel": 1,
    "column_merge_kernel": 1,
}
# An SM has 65536: of so many registers, 512 threads run at a time.
MAX_REGISTERS = 128


def nvcc(*options):
    flags = ["-std=c++20", "-O3", "-fmad=false"]
    return run_checked([NVCC, *flags, *options, ROOT / SOURCE])


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """For each architecture the compiler's report, and the folder of what it made."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_for(architecture):
        cubin = folder / f"{architecture}.cubin"
        return nvcc("-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", cubin)

    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES), strict=True))
    return reports, folder


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The instructions of every kernel, by its mangled name."""
    path = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    nvcc("-ptx", "-arch=compute_80", "-o", path)
    functions = re.split(r"\.visible \.entry ", path.read_text())[1:]
    return {text.split("(", 1)[0]: text for text in functions}


def named(name, kernels):
    return [text for mangled, text in kernels.items() if f"{len(name)}{name}" in mangled]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_no_local_memory(resources, architecture):
    report = resources[0][architecture]
    assert "warning" not in report, report
    entries = report.split("Compiling entry function '")[1:]
    kernels = {entry.split("'", 1)[0]: entry for entry in entries}
    for name, count in KERNELS.items():
        assert len(named(name, kernels)) == count, name
    assert len(kernels) == sum(KERNELS.values())
    for name, entry in kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in entry, f"{name}: {entry}"
        assert int(re.search(r"Used (\d+) registers", entry)[1]) <= MAX_REGISTERS, f"{name}: {entry}"
        shared = re.search(r"(\d+) bytes smem", entry)
        assert shared is None or int(shared[1]) <= 48 << 10, f"{name}: {entry}"


def test_16_bytes_at_a_time(ptx):
    for text in named("gram_uniform_kernel", ptx):
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 16, ", text)
        assert not re.search(r"ld\.global[.\w]*\.[bu](16|32)\b", text)  # the rest are tables, of 8 bytes and 1
    for text in named("merge_uniform_kernel", ptx):
        assert text.count("ld.global.v4.u32") == 5  # the base, and four models
        assert "st.global.v4" in text


def test_arithmetic_is_what_is_written(ptx):
    """Nothing is contracted, flushed, approximated, or added atomically in floating point."""
    for name, text in ptx.items():
        assert not re.search(
            r"\b(mad\.rn\.f|atom[.\w]*\.f(16|32|64)|red[.\w]*\.f(16|32|64)|\w+\.ftz\b|[.]approx)", text
        ), name
        assert not re.search(r"\b(ld|st)\.local\b", text), name
        assert not re.search(r"\b(ld|st)(\.v\d)?\.[fubs](8|16|32|64)\b", text), f"{name}: generic loads or stores"


def test_machine_code_loads_16_bytes(resources):
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    dump = subprocess.run(
        [cuobjdump, "-sass", resources[1] / "90.cubin"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    functions = {text.split("\n", 1)[0]: text for text in dump.split("Function : ")[1:]}
    for text in named("merge_uniform_kernel", functions):
        assert "LDG.E.128" in text
    for text in named("gram_uniform_kernel", functions):
        assert re.search(r"LDGSTS\.E\.BYPASS[.\w]*\.128", text)


def test_the_build_compiles_for_what_the_docs_say():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert '"80-real;86-real;89-real;90-real;120"' in text
    assert "8.0, 8.6, 8.9, 9.0, 12.0, and as PTX" in (ROOT / "docs" / "gpu-streaming.md").read_text()
