"""``metagpt-fast bench``: it measures, checks, predicts, cleans up, and says what is wrong. Tiny sizes, no timing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from metagpt_fast import _native
from metagpt_fast.benchmarking import run, tables
from metagpt_fast.benchmarking.bus import find_bus, measure_bus
from metagpt_fast.benchmarking.files import (
    incompressible,
    new_file,
    write_beside,
    write_items,
)
from metagpt_fast.benchmarking.memory import measure_memory, numel_for, round_nbytes
from metagpt_fast.benchmarking.pass_progress import PassProgress
from metagpt_fast.benchmarking.prediction import BUS, DISK_READ, DISK_WRITE, KERNELS, MEMORY, predict
from metagpt_fast.benchmarking.rates import BusRates, Rates
from metagpt_fast.benchmarking.reading import read_as_merge
from metagpt_fast.benchmarking.trial import Check, make_files, warnings_of
from metagpt_fast.benchmarking.work import Work
from metagpt_fast.cli import cli
from metagpt_fast.errors import BackendError, OutputError, RecipeError
from metagpt_fast.family import PRESETS, family_nbytes
from metagpt_fast.progress import Progress

from .fake_device import FakeDevice

SIZE = 4 << 20
G = 10**9
RATES = Rates(20 * G, 18 * G, 19 * G, 17 * G, 2 * G, 10 * G, 5 * G, G, 0.25, 0.05)


@pytest.fixture(autouse=True, scope="module")
def small_arrays():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run, "numel_for", lambda available: 1 << 16)
        yield


class Recording(Progress):
    """Remembers phases with what was announced and what was done; interrupts where it is told to."""

    def __init__(self, interrupt=None, *, at_start=True):
        self.phases = []
        self._interrupt, self._at_start = interrupt, at_start

    def start(self, phase, total_nbytes):
        self.phases.append([phase, total_nbytes, 0])
        self._check(at_start=True)

    def advance(self, nbytes):
        self.phases[-1][2] += nbytes
        self._check(at_start=False)

    def _check(self, *, at_start):
        if self.phases[-1][0] == self._interrupt and at_start == self._at_start:
            raise KeyboardInterrupt


PHASES = [
    "memory, kernels", "write", "make files", "read", "read again", "read and write", "merge by model",
    "merge by layer",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run.run_bench(tmp_path_factory.mktemp("bench"), SIZE, Progress())


def test_everything_is_measured_and_nothing_is_left(tmp_path):
    progress = Recording()
    result = run.run_bench(tmp_path, SIZE, progress)
    assert [phase for phase, _, _ in progress.phases] == PHASES
    for phase, announced, done in progress.phases:
        assert done == announced > 0, phase
    assert list(tmp_path.iterdir()) == []
    rates = [value for value in result.to_dict()["rates"].values() if isinstance(value, float)]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert len(rates) == 10
    assert [(check.granularity, check.is_warm) for check in result.checks] == [
        ("model", False), ("model", True), ("layer", False), ("layer", True),
    ]  # fmt: skip
    assert all(check.seconds > 0 and check.predicted.seconds > 0 for check in result.checks)
    assert 0.7 * SIZE < result.files_nbytes < 1.1 * SIZE
    assert len(result.forecasts) >= 6


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("at_start", [True, False])
def test_an_interrupt_leaves_nothing(tmp_path, phase, at_start):
    with pytest.raises(KeyboardInterrupt):
        run.run_bench(tmp_path, SIZE, Recording(phase, at_start=at_start))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path, signum):
    command = [sys.executable, "-m", "metagpt_fast", "bench", str(tmp_path), "--size", "400MB", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".metagpt-fast-bench-*/*")):
        time.sleep(0.01)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[signum], stderr
    assert (stdout, list(tmp_path.iterdir())) == ("", [])
    assert "Traceback" not in stderr


def test_files_that_stay_in_memory_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "percent_cached", lambda files: 100.0)
    result = run.run_bench(tmp_path, SIZE, Progress())
    assert not result.is_cold
    assert "stay in memory" in result.warnings[0]


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="is not there"):
        run.run_bench(tmp_path / "missing", SIZE, Progress())
    with pytest.raises(OutputError, match="is no folder"):
        run.run_bench(file, SIZE, Progress())
    with pytest.raises(RecipeError, match=r"size: too small .* got 1\.00 MB"):
        run.run_bench(tmp_path, 10**6, Progress())
    monkeypatch.setattr(run, "free_nbytes", lambda folder: 5 * 10**6)
    with pytest.raises(OutputError, match=r"too little free space .* got 5\.00 MB free, expected 5\.45 MB .*--size"):
        run.run_bench(tmp_path, SIZE, Progress())
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot measure the disk"):
        run.run_bench(tmp_path, SIZE, Progress())


def test_a_full_disk_is_an_error_about_the_folder(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_seconds", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run.run_bench(tmp_path, SIZE, Progress())
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path):
    done = CliRunner().invoke(cli, ["bench", str(tmp_path), "--size", "4MiB", "--threads", "1", "-q"])
    assert done.exit_code == 0, done.output
    for words in ("Measured", "kernel layer_gram", "Check", "7 B", "70 B", "405 B", "waits for", " 1 thread, "):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
    as_json = CliRunner().invoke(cli, ["bench", str(tmp_path), "--size", "4MiB", "--json", "-q"])
    values = json.loads(as_json.stdout)
    assert values["rates"]["disk_read"] > 0
    assert values["checks"][0]["predicted"]["seconds"] > 0
    assert {each["model"] for each in values["forecasts"]} == {"7 B", "70 B", "405 B"}
    assert values["forecasts"][0]["bottleneck"] in values["forecasts"][0]["cold"]["parts"]


def test_errors_of_the_command(tmp_path):
    done = CliRunner().invoke(cli, ["bench", str(tmp_path / "missing"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["where"] == str(tmp_path / "missing")
    assert CliRunner().invoke(cli, ["bench", "--size", "much"]).exit_code == 2


def test_progress_of_a_merge_counts_its_inputs_twice():
    progress = Recording()
    progress.start("merge by layer", 40)
    inner = PassProgress(progress.advance)
    for phase in ("measure", "combine", "measure and combine"):
        inner.start(phase, 10)
        inner.advance(10)
        inner.finish()
    assert progress.phases == [["merge by layer", 40, 40]]


@pytest.mark.parametrize(("sharing", "words"), [(0.0, "the longer of"), (0.5, "50%"), (1.0, "one after the other")])
def test_reading_and_writing_at_once_in_words(result, capsys, sharing, words):
    tables.print_bench(replace(result, rates=replace(RATES, sharing=sharing)))
    assert words in next(line for line in capsys.readouterr().out.splitlines() if "at once" in line)


def test_a_wrong_prediction_is_warned_of():
    predicted = predict(Work((G,), 3), RATES, G * 10)
    close, slow, fast = (Check("model", False, predicted, predicted.seconds * factor) for factor in (1.4, 1.6, 1 / 1.6))
    assert [check.is_close for check in (close, slow, fast)] == [True, False, False]
    assert warnings_of([close]) == []
    [warning] = warnings_of([close, slow, fast])
    assert "1.60 (model, on the disk), 0.62 (model, on the disk) times as long" in warning


@pytest.mark.parametrize(
    ("bottleneck", "words"),
    [
        (DISK_READ, "2.00 GB/s"),
        (DISK_WRITE, "1.00 GB/s"),
        (MEMORY, "can take 10.0 GB/s"),
        (KERNELS, "19.0 GB/s of the 20.0 GB/s"),
        (BUS, "30.0 GB/s"),
    ],
)
def test_bottlenecks_in_words(result, bottleneck, words):
    measured = replace(result, rates=replace(RATES, bus=BusRates("cuda:0 (X)", 30 * G, 25 * G)))
    assert words in tables.advice(measured, bottleneck)


def test_the_table_with_a_gpu_and_room_for_the_inputs(result, capsys):
    rates = replace(RATES, bus=BusRates("cuda:0 (Some GPU)", 30 * G, 25 * G))
    forecasts = tuple(run.forecasts_of(rates, 100 * G))
    tables.print_bench(replace(result, rates=rates, cache_nbytes=100 * G, forecasts=forecasts))
    printed = capsys.readouterr().out
    assert "bus to the GPU" in printed
    assert "cuda:0 (Some GPU)" in printed
    [header] = [line for line in printed.splitlines() if line.startswith("model ") and "inputs cached" in line]
    assert "device  granularity" in header
    [row] = [line for line in printed.splitlines() if line.startswith("7 B")]
    assert "warm" in row
    assert row.split()[-5:-3] != ["–"]
    assert any(" % warm" in line for line in printed.splitlines() if line.startswith("70 B"))


def test_without_a_gpu_the_reason_is_given():
    bus, reason = find_bus()
    assert (bus is None) == bool(reason)


def test_the_bus_of_a_device():
    device = FakeDevice()
    rates = measure_bus(device)
    assert rates.name == device.name
    assert rates.to_device > 0
    assert rates.to_host > 0
    device.close()


def test_a_device_that_fails_is_no_gpu(monkeypatch):
    class Broken(FakeDevice):
        def allocate_pinned(self, nbytes):
            raise BackendError("CUDA failed", got="out of memory")

    monkeypatch.setattr("metagpt_fast.backends.cuda_device.CudaDevice", Broken)
    assert find_bus() == (None, "CUDA failed: got out of memory")


def test_memory_is_measured_on_what_was_announced():
    done = []
    rates = measure_memory(10_000, done.append)
    assert sum(done) == round_nbytes(10_000)
    # read, triad, gram, merge, in bf16: 4, 3 (counted as fp32 on half as many), 4 and 5 arrays; eight rounds
    assert sum(done) == 8 * 2 * 10_000 * (4 + 3 + 4 + 5)
    assert min(rates.memory_read, rates.memory_triad, rates.layer_gram, rates.layer_merge) > 0
    assert numel_for(10**6) == 1 << 16
    assert numel_for(8 << 30) == 64 << 20


def test_writing(tmp_path):
    done = []
    content = incompressible(4096)
    target = tmp_path / "target"
    with new_file(target, 10_000) as fd:
        write_items(fd, 10_000, content, 3, done.append)
        assert target.read_bytes() == (bytes(content) * 3)[:10_000]
    assert sum(done) == 10_000
    assert not target.exists()


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_reading_as_a_merge_reads_every_byte_of_every_tensor(tmp_path, monkeypatch, io):
    monkeypatch.setattr("metagpt_fast.input_files._choose_io", lambda paths: io)
    family = make_files(tmp_path, PRESETS["tiny"].shape, lambda nbytes: None)
    touched = []
    plain = _native.bandwidth_read
    monkeypatch.setattr(_native, "bandwidth_read", lambda *where: touched.append(where[1]) or plain(*where))
    done = []
    assert read_as_merge(family.base, family.models, PassProgress(done.append)) == sum(done)
    assert sum(done) == family_nbytes(PRESETS["tiny"].shape, 3)
    assert sum(touched) == (sum(done) if io == "mmap" else 0)


def test_reading_beside_writing_ends_with_both(tmp_path):
    order, done = [], []

    def read(advance):
        advance(7)
        order.append("read")

    assert write_beside(read, tmp_path / "target", 5 << 20, done.append) > 0
    assert order == ["read"]
    assert sum(done) == (5 << 20) + 7
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_either_ends_both(tmp_path):
    def fail(advance):
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        write_beside(fail, tmp_path / "target", 1 << 20)
    assert list(tmp_path.iterdir()) == []

    def read_for_ever(advance):
        while True:
            advance(1)

    (tmp_path / "target").touch()
    with pytest.raises(FileExistsError):
        write_beside(read_for_ever, tmp_path / "target", 1 << 20)


def test_help_fits_80_columns():
    text = CliRunner().invoke(cli, ["bench", "--help"], prog_name="metagpt-fast").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "metagpt-fast bench /data/models" in text
    assert Path("docs/benchmarks.md").name in text
