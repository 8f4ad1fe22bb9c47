"""What surrounds the measuring in bench/: bytes, the JSON, tables, verdicts, the memory sampler. No timing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from metagpt_fast import _native
from metagpt_fast.family import BASE_NAME, NAMES, PRESETS, make_family
from metagpt_fast.merging import merge

from .tools import ROOT

sys.path.append(str(ROOT / "bench"))  # behind everything else: its names are plain

import baselines
import compare
import table
from benchlib.file_ways import Target, read_buffers, read_direct, read_mapped, supports_direct
from benchlib.processes import ProcessError, run_measured
from benchlib.rows import Result, Row, Spread, gram_nbytes, load_rows, merge_nbytes, save_rows

from metagpt_fast.benchmarking.arrays import DTYPES, make_layer_arrays
from metagpt_fast.page_cache import evict, fill, percent_cached

MACHINE = {
    "cpu": "Some CPU",
    "num_cores": 2,
    "isa": "avx2",
    "memory_gib": 15.6,
    "os": "Linux 6.1",
    "file_system": "ext4",
    "disk_write_gb_per_s": 1.25,
}
SIZES = {"num_parameters": 1_100_048_384, "model_nbytes": 2_200_096_768, "num_models": 3}


def kernel_row(*rates: float) -> Row:
    parameters = {"kernel": "layer_gram", "dtype": "bf16", "num_models": 3, "isa": "avx2", "threads": 1}
    metrics = {"gb_per_s": Spread.of(rates), "percent_of_ceiling": Spread.of([95.0, 96.0])}
    return Row("kernels", "layer_gram bf16 T=3 avx2 threads=1", parameters, metrics, "(1+T)·n·itemsize", 800)


def merge_row(*seconds: float, name: str = "metagpt, model, warm") -> Row:
    metrics = {
        "seconds": Spread.of(seconds),
        "ratio_to_reference": Spread.of([s / 4 for s in seconds]),
        "gb_per_s": Spread.of([20 / s for s in seconds]),
        "user_seconds": Spread.of([1.0]),
        "system_seconds": Spread.of([0.5]),
        "peak_anonymous_mb": Spread.of([42.0]),
    }
    return Row("merge", name, {**SIZES, "cache": "warm"}, metrics, notes=("a note",))


def result(*rows: Row, **machine: object) -> Result:
    versions = {"python": "3.11.7", "numpy": "2.0.0"}
    return Result("2026-01-02", "0123456789", {**MACHINE, **machine}, versions, {"quick": False}, rows)


def test_bytes_of_the_kernels():
    assert gram_nbytes(numel=100, itemsize=2, num_models=3) == (1 + 3) * 100 * 2
    assert merge_nbytes(numel=100, itemsize=2, num_models=3) == (2 + 3) * 100 * 2


def test_spread():
    few = Spread.of([3.0, 1.0, 2.0])
    assert (few.median, few.min, few.max, few.n) == (2.0, 1.0, 3.0, 3)
    assert few.interval == (1.0, 3.0)
    many = Spread.of([100.0, *(float(i) for i in range(10)), -100.0])
    assert many.interval == (many.p20, many.p80)
    assert -100 < many.p20 < many.median < many.p80 < 100
    assert Spread.of([5.0]).interval == (5.0, 5.0)


def test_json_round_trip(tmp_path):
    before = result(kernel_row(10.0, 11.0), merge_row(1.0, 2.0))
    path = tmp_path / "results" / "some.json"
    before.save(path)
    assert Result.load(path) == before
    save_rows(before.rows, tmp_path / "rows.json")
    assert load_rows(tmp_path / "rows.json") == list(before.rows)


def test_json_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="got schema 0, expected 1"):
        Result.load(path)


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="got metrics"):
        Row("merge", "x", {}, {"secnods": Spread.of([1.0])})


def test_table():
    rows = [merge_row(1.0, 2.0), kernel_row(10.0, 11.0), Row("startup", "metagpt-fast --help", {"imported": []},
            {"seconds": Spread.of([0.06])})]  # fmt: skip
    text = table.bench_table(result(*rows), "bench/results/some.json")
    assert "Some CPU, 2 cores, AVX2, 16 GiB, Linux 6.1, ext4" in text
    assert "commit 0123456789" in text
    assert "1.1 B parameters" in text
    assert "| metagpt, model, warm | 1.50 (1.00..2.00) | 0.375 (0.250..0.500) | 15.0 | 1.50 | 42.0 |  |" in text
    assert "| `layer_gram` | bf16 | 3 | avx2 | 1 | 10.5 (10.0..11.0) | 95.5 (95.0..96.0) |  |  |" in text
    assert "| `metagpt-fast --help` | 0.060 | none |" in text


def test_the_readmes_table_has_every_merge_beside_its_reference():
    reference = Row("merge", "reference, 1 read, warm", {**SIZES, "cache": "warm", "num_reads": 1},
                    {"seconds": Spread.of([4.0])})  # fmt: skip
    ours, slower = merge_row(1.0, 2.0), merge_row(6.0, name="metagpt, layer, warm")
    ours.parameters.update(case="metagpt, model", num_reads=1)
    slower.parameters.update(case="metagpt, layer", num_reads=1)
    huge = merge_row(40.0, name="metagpt, model, scale 4")
    huge.parameters.update(case="metagpt, model", num_reads=2, cache="scale 4", model_nbytes=8_900_000_000)
    text = table.readme_table(result(reference, ours, slower, huge), "bench/results/some.json")
    numbers = "1.50 (1.00..2.00) | 4.00 | 0.375 (0.250..0.500) | 15.0 | 42.0 |  |"
    assert f"| `--granularity model` | 8.8 GB, warm | 2 | {numbers}" in text
    assert "| `--granularity layer` | 8.8 GB, warm | 1 | 6.00 | 4.00 | 1.50 | 3.33 | 42.0 |  |" in text
    assert "| `--granularity model` | 35.6 GB, more than the memory | 1 | 40.0 |  |" in text
    assert "reference, 1 read" not in text


def test_the_readmes_table_has_the_main_kernels_and_the_start():
    other = Row("kernels", "other", {**kernel_row(1.0).parameters, "dtype": "f64"}, kernel_row(77.0).metrics)
    start = Row("startup", "metagpt-fast --help", {"imported": []}, {"seconds": Spread.of([0.06])})
    text = table.readme_table(result(kernel_row(10.0, 11.0), other, start), "some.json")
    assert "| `layer_gram` | bf16 | 3 | avx2 | 1 | 10.5 (10.0..11.0) |" in text
    assert "77.0" not in text
    assert "77.0" in table.readme_table(result(other), "some.json")  # better than an empty table
    assert text.endswith("Start: `metagpt-fast --help` 0.060 s.")


def io_row(action: str, way: str, cache: str, **parameters: object) -> Row:
    facts = {"action": action, "way": way, "cache": cache, **parameters}
    metrics = {"gb_per_s": Spread.of([5.0]), "percent_of_ceiling": Spread.of([50.0, 60.0])}
    return Row("io", f"{action} {way}, {cache}", facts, metrics)


def test_table_of_files():
    rows = [io_row("read", "map", "warm"), io_row("measure", "--io auto", "cold", io="mmap"),
            io_row("write", "direct", "disk")]  # fmt: skip
    text = table.bench_table(result(*rows), "some.json")
    assert "| read map | warm | 5.00 |  | 55.0 (50.0..60.0) |" in text
    assert "| measure `--io auto` (chose mmap) | cold | 5.00 |" in text
    assert "| write direct | until on the disk | 5.00 |" in text


def test_files_are_benchmarked_in_every_way(tmp_path):
    """Whether it runs, and what its rows say; which of them there are depends on the file system."""
    rows_file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "bench_io.py"), "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", "--rows", str(rows_file), "--io-folder", str(tmp_path), "--io-size", "4MB"]
    done = subprocess.run([*command, "--io-rounds", "1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row.name: row for row in load_rows(rows_file)}
    always = {f"read {way}, warm" for way in ("map", "pread")}
    always |= {f"measure --io {io}, warm" for io in ("auto", "mmap", "pread")}
    always |= {f"write {way}, cache" for way in ("buffered", "mapped")}
    on_disk = {f"write {way}, disk" for way in ("buffered", "mapped", "direct")}
    on_disk |= {name.replace("warm", "cold") for name in always if "warm" in name} | {"read direct, cold"}
    assert always <= set(rows) <= always | on_disk
    assert rows["measure --io auto, warm"].parameters["io"] in {"mmap", "pread"}
    for row in rows.values():
        seconds, rate = row.metrics["seconds"].median, row.metrics["gb_per_s"].median
        assert rate == pytest.approx(row.nbytes / seconds / 1e9)
        ceiling = row.metrics["ceiling_gb_per_s"].median
        assert row.metrics["percent_of_ceiling"].median == pytest.approx(100 * rate / ceiling)
    assert rows["read map, warm"].nbytes // 4 == pytest.approx(rows["write buffered, cache"].nbytes, abs=4096)
    assert not list(tmp_path.glob("metagpt-fast-bench-*"))


def test_kernels_are_benchmarked_in_several_turns(tmp_path):
    rows_file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "bench_kernels.py"), "-p", "no:cacheprovider"]
    command += ["-k", "test_kernel", "--numel", "5000", "--turns", "3", "--rounds", "2", "--baseline-rounds", "1"]
    command += ["--rows", str(rows_file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = load_rows(rows_file)
    isa, threads = _native.supported_isas()[-1], sorted({1, len(os.sched_getaffinity(0))})
    kernels = ("layer_gram", "layer_merge")
    assert {row.name for row in rows} == {f"{k} bf16 T=3 {isa} threads={n}" for k in kernels for n in threads}
    for row in rows:
        assert row.metrics["seconds"].n == row.metrics["percent_of_ceiling"].n == 6
        assert row.metrics["gb_per_s"].max == pytest.approx(row.nbytes / row.metrics["seconds"].min / 1e9)
        assert "speedup_numpy" in row.metrics


@pytest.mark.parametrize("way", ["buffered", "mapped", "direct"])
def test_every_way_to_write_fills_the_file(tmp_path, way):
    if way == "direct" and not supports_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    path = tmp_path / "file"
    target = Target(way, path, 5 << 20, num_threads=3)
    with target.ready() as fill:
        fill(True)
        content = path.read_bytes()
        assert len(content) == 5 << 20
        assert content[: 1 << 19] == content[4 << 20 : (4 << 20) + (1 << 19)] != bytes(1 << 19)
        assert read_buffers([path], 3) == read_mapped([path]) == 5 << 20
        assert way != "direct" or read_direct([path], 3) == 5 << 20
    assert not path.exists()


def test_table_goes_between_the_markers(tmp_path):
    path = tmp_path / "results" / "some.json"
    result(kernel_row(10.0)).save(path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    done = CliRunner().invoke(table.main, [str(path), "--write", str(readme)])
    assert done.exit_code == 0, done.output
    text = readme.read_text()
    assert text.startswith(f"before\n\n{table.BEGIN}\nSome CPU")
    assert text.endswith(f"|\n{table.END}\n\nafter\n")
    assert "[some.json](results/some.json)" in text
    assert "old" not in text


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END}{table.BEGIN}", table.BEGIN * 2 + table.END])
def test_markers_that_do_not_pair_are_refused(text):
    with pytest.raises(ValueError, match="expected one"):
        table.replace_block(text, "table")


@pytest.mark.parametrize(
    ("metric", "old", "new", "judgement"),
    [
        ("seconds", [1.0, 1.1], [1.2, 1.3], "worse"),
        ("seconds", [1.2, 1.3], [1.0, 1.1], "better"),
        ("seconds", [1.0, 1.2], [1.1, 1.4], "same"),  # the spreads overlap
        ("seconds", [1.0, 1.0], [1.02, 1.02], "same"),  # within the tolerance
        ("seconds", [1.0, 1.0], [1.05, 1.05], "worse"),
        ("seconds", [1.0], [1.05, 1.06], "same"),  # measured once: no spread is known
        ("seconds", [1.0], [1.15, 1.16], "worse"),
        ("gb_per_s", [10.0, 11.0], [8.0, 9.0], "worse"),
        ("gb_per_s", [8.0, 9.0], [10.0, 11.0], "better"),
        ("peak_anonymous_mb", [40.0], [80.0], "worse"),
    ],
)
def test_verdicts(metric, old, new, judgement):
    assert compare.judge(metric, Spread.of(old), Spread.of(new)) == judgement


def test_compare_ends_with_1_only_if_something_got_worse(tmp_path):
    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    result(merge_row(1.0, 1.1)).save(fast)
    result(merge_row(2.0, 2.2), kernel_row(10.0)).save(slow)
    worse = CliRunner().invoke(compare.main, [str(fast), str(slow)])
    assert worse.exit_code == 1
    assert "worse" in worse.output
    assert "at most 100.0 %" in worse.output
    assert "only in one of them: kernels: layer_gram bf16 T=3 avx2 threads=1" in worse.output
    assert CliRunner().invoke(compare.main, [str(slow), str(fast)]).exit_code == 0
    assert CliRunner().invoke(compare.main, [str(fast), str(fast)]).exit_code == 0


def test_other_machines_are_compared_by_ratios_only():
    old, new = result(merge_row(1.0)), result(merge_row(2.0), cpu="Another CPU")
    assert {verdict.metric for verdict in compare.compare(old, new)} == {"ratio_to_reference", "peak_anonymous_mb"}


def test_memory_sampler_sees_what_a_process_allocates(tmp_path):
    # Touched, held long enough for many samples, and given back before the end.
    code = "import time; a = bytearray(b'x') * (200 << 20); time.sleep(0.3); del a"
    usage = run_measured([sys.executable, "-c", code], folder=tmp_path)
    assert usage.peak_anonymous_nbytes is not None
    assert 200 << 20 < usage.peak_anonymous_nbytes < 260 << 20
    assert usage.peak_resident_nbytes is not None
    assert usage.peak_resident_nbytes >= usage.peak_anonymous_nbytes
    assert usage.seconds > 0.3


def test_a_failing_process_says_why():
    with pytest.raises(ProcessError, match=r"exit status 3 .*\n.*no such luck"):
        run_measured([sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(ProcessError, match="cannot run"):
        run_measured(["/nonexistent/program"])


def test_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    fill([path])
    assert percent_cached([path]) == 100.0
    evict([path])  # has no effect where files live in memory, so nothing is said about the result
    assert 0.0 <= percent_cached([path]) <= 100.0


@pytest.fixture
def _torch_threads():
    """The baselines split the work themselves, and set torch to one thread for the whole process."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_torch_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_baselines_compute_what_the_kernels_do(dtype):
    from metagpt_fast.backends.cpu import CpuBackend
    from metagpt_fast.reference import to_float64

    layer = make_layer_arrays(DTYPES[dtype], 3, baselines.CHUNK_NUMEL + 1000)
    CpuBackend().layer_gram(layer.table, layer.gram)
    wanted = layer.gram[0]
    tensors = baselines.torch_tensors(layer)
    np.testing.assert_allclose(baselines.numpy_gram(layer), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(baselines.torch_gram(tensors[:-1], threads=2), wanted, rtol=1e-4, atol=1e-3)

    CpuBackend().layer_merge(layer.table, layer.coefficients, layer.out_table)
    merged = to_float64(layer.arrays[-1].copy(), layer.dtype)
    for run in (
        lambda: baselines.numpy_merge(layer),
        lambda: baselines.torch_merge(tensors, layer.coefficients[0].tolist(), threads=2),
    ):
        layer.arrays[-1][:] = 0
        run()
        # The baselines round products and sums apart, the kernels once: one step of bf16 at a border.
        np.testing.assert_allclose(to_float64(layer.arrays[-1], layer.dtype), merged, rtol=2**-7, atol=1e-6)


def test_plain_torch_script_merges_what_we_merge(tmp_path):
    preset = PRESETS["tiny"]
    family = make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=5)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    merge(family.base, family.models, ours, method="task_arithmetic", max_shard_size=preset.max_shard_nbytes)
    script = ROOT / "bench" / "baselines.py"
    inputs = [str(tmp_path / name) for name in (BASE_NAME, *NAMES)]
    subprocess.run([sys.executable, str(script), *inputs, "-o", str(theirs)], check=True, cwd=tmp_path)
    compared = 0
    for name, tensor in load_all(ours).items():
        other = load_all(theirs)[name]
        np.testing.assert_allclose(other, tensor, rtol=2**-7, atol=1e-6, err_msg=name)
        compared += tensor.size
    assert compared == family.num_parameters


def load_all(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    return tensors
