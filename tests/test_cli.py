"""The command: usage, help, exit statuses, what goes to stdout and what to stderr, and how fast it starts.

Most run with a fake in the place of the merge, which has tests of its own.
"""

from __future__ import annotations

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from metagpt_fast.cli import cli
from metagpt_fast.cli_options import AssignmentType
from metagpt_fast.errors import OutputError, PlanError
from metagpt_fast.family import PRESETS, make_family

REPOSITORY = Path(__file__).parents[1]
BASIC = ["merge", "base", "chat", "math", "-o", "out"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Forget what the terminal that runs the tests asks of rich and of this command."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "METAGPT_FAST_DEBUG", "METAGPT_FAST_ISA"):
        monkeypatch.delenv(name, raising=False)


class FakeReport(SimpleNamespace):
    def to_dict(self):
        return {"coefficients": self.coefficients.tolist(), "warnings": list(self.warnings)}


REPORT = FakeReport(
    out=Path("out"),
    base="base",
    models=("chat", "math"),
    labels=("chat", "math"),
    method="metagpt",
    parameters={},
    granularity="model",
    exclude=None,
    out_dtype="BF16",
    scopes=("model",),
    coefficients=np.array([[0.25, 0.75]]),
    norms=np.array([1.0, 3.0]),
    cosines=np.eye(2),
    base_norm=10.0,
    warnings=("look at this",),
    num_tensors=2,
    num_copied=0,
    num_parameters=1000,
    nbytes_read=6000,
    nbytes_written=2000,
    seconds=0.5,
    seconds_measure=0.2,
    seconds_combine=0.3,
    backend="cpu",
    isa="scalar",
    device="cpu",
    device_reason="asked for",
    num_threads=1,
    io="mmap",
    measurement_reused=False,
    shards=("model.safetensors",),
    recipe=None,
)


class FakeMeasurement:
    labels = ("chat", "math")
    norms = np.array([1.0, 3.0])
    cosines = np.eye(2)
    base_norm = 10.0

    def coefficients(self, exponent=2.0):
        return np.array([0.1, 0.9])

    def warnings(self):
        return ("look at this",)

    def to_dict(self):
        return {"norms": self.norms.tolist()}


@pytest.fixture
def calls(monkeypatch):
    """Put a fake metagpt_fast.merging in place, and return what the command called, with what."""
    log = []

    def merge(base, models, out, *, progress, **settings):
        log.append(("merge", base, models, out, settings))
        progress.start("measure", 4000)
        progress.advance(4000)
        progress.finish()
        return REPORT

    def measure(base, models, *, out, progress, **settings):
        log.append(("measure", base, models, out, settings))
        return FakeMeasurement()

    fake = ModuleType("metagpt_fast.merging")
    fake.merge, fake.measure = merge, measure
    monkeypatch.setitem(sys.modules, "metagpt_fast.merging", fake)
    return log


def run(*arguments):
    return CliRunner().invoke(cli, list(arguments), prog_name="metagpt-fast")


def raise_in_merge(monkeypatch, error):
    def merge(*arguments, **settings):
        raise error

    monkeypatch.setattr(sys.modules["metagpt_fast.merging"], "merge", merge)


def test_merge_passes_every_option_on(calls):
    result = run(
        *BASIC,
        *("--method", "linear", "--granularity", "layer", "--exponent", "1.5", "--coefficients", "-0.3,0.5"),
        *("--set", "a=1", "--set", "b=x", "--set", "c=1,2.5", "--set", "d=true", "--dtype", "bf16"),
        *(
            "--backend",
            "cpu",
            "--threads",
            "3",
            "--memory",
            "512MiB",
            "--io",
            "pread",
            "--device",
            "cuda:1",
            "--device-memory",
            "1GiB",
            "--max-shard-size",
            "1GB",
        ),
        *("--exclude", "lm_head", "--measurement", "m.json", "--overwrite", "--resume", "--no-sync"),
        *("--allow-nonfinite", "--copy-code"),
    )
    assert result.exit_code == 0, result.output
    [(_, base, models, out, settings)] = calls
    assert (base, models, out) == ("base", ["chat", "math"], "out")
    assert settings == {
        "method": "linear",
        "granularity": "layer",
        "exponent": 1.5,
        "coefficients": (-0.3, 0.5),
        "parameters": {"a": 1, "b": "x", "c": [1, 2.5], "d": True},
        "dtype": "bf16",
        "backend": "cpu",
        "threads": 3,
        "memory": "512MiB",
        "io": "pread",
        "device": "cuda:1",
        "device_memory": "1GiB",
        "max_shard_size": "1GB",
        "exclude": "lm_head",
        "measurement": "m.json",
        "overwrite": True,
        "resume": True,
        "sync": False,
        "allow_nonfinite": True,
        "copy_code": True,
    }


@pytest.mark.parametrize("command", ["merge", "measure"])
def test_the_commands_settings_and_defaults_are_the_functions(command, monkeypatch):
    module = import_module("metagpt_fast.merging")
    parameters = inspect.signature(getattr(module, command)).parameters
    defaults = {name: item.default for name, item in parameters.items() if item.default is not item.empty}
    passed = {}

    def record(*arguments, **settings):
        passed.update(settings)
        raise OutputError("enough")

    monkeypatch.setattr(module, command, record)
    run(command, "base", "chat", "-o", "out")
    assert passed.pop("progress") is not None
    defaults.pop("progress")
    if defaults.pop("out", "required") is None:
        assert passed.pop("out") == "out"
    assert passed == defaults


def test_merge_prints_tables_to_stdout_and_progress_to_stderr(calls):
    result = run(*BASIC)
    assert result.exit_code == 0
    assert "chat   0.2500" in result.stdout
    assert "warning: look at this" in result.stdout
    assert result.stderr.startswith("measure: 4.00 kB in ")
    assert run(*BASIC, "--quiet").stderr == ""


def test_merge_json_is_nothing_but_json(calls):
    result = run(*BASIC, "--json")
    assert json.loads(result.stdout) == {"coefficients": [[0.25, 0.75]], "warnings": ["look at this"]}
    assert "warning: look at this" in result.stderr


@pytest.fixture
def family(tmp_path):
    preset = PRESETS["tiny"]
    make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
    return tmp_path


def test_dry_run_prints_the_plan_and_touches_nothing(family):
    inputs = [str(family / name) for name in ("base", "chat", "math")]
    arguments = ["merge", *inputs, "-o", str(family / "out"), "--dry-run", "--exclude", "lm_head"]
    result = run(*arguments, "--max-shard-size", "128KiB")
    assert result.exit_code == 0, result.output
    for expected in (
        "metagpt; granularity model",
        f"{inputs[0]} (",
        "20 to merge, 1 to copy from the base",
        "to measure, then",
        "in 2 shards",
        "nothing was written",
    ):
        assert expected in result.stdout
    plan = json.loads(run(*arguments, "--granularity", "layer", "--json").stdout)
    assert plan["granularity"] == "layer"
    assert [shard["name"] for shard in plan["shards"]] == ["model.safetensors"]
    assert sorted(path.name for path in family.iterdir()) == ["base", "chat", "code", "math"]


def test_dry_run_finds_what_stops_the_merge(family):
    inputs = [str(family / name) for name in ("base", "chat")]
    result = run("merge", *inputs, "-o", str(family / "math"), "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_dry_run_looks_at_a_measurement_as_the_merge_does(family):
    inputs = [str(family / name) for name in ("base", "chat")]
    arguments = ["merge", *inputs, "-o", str(family / "out"), "--measurement", str(family / "m.json"), "--dry-run"]
    assert json.loads(run(*arguments, "--json").stdout)["measurement_reused"] is False
    assert not (family / "m.json").exists()
    assert run("measure", *inputs, "-o", str(family / "m.json")).exit_code == 0
    assert "the measurement is reused" in run(*arguments).stdout
    plan = json.loads(run(*arguments, "--json").stdout)
    assert (plan["measurement_reused"], plan["nbytes_measured"]) == (True, 0)
    (family / "m.json").write_text("{}")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "m.json" in result.stderr


def test_dry_run_refuses_too_little_memory_as_the_merge_does(family):
    inputs = [str(family / name) for name in ("base", "chat")]
    for options in ([], ["--dry-run"]):
        result = run("merge", *inputs, "-o", str(family / "out"), "--memory", "1MiB", *options)
        assert result.exit_code == 1
        assert "expected at least 64MiB" in result.stderr


def test_a_parameter_of_many_levels_is_text():
    assert AssignmentType().convert("x=" + "[" * 100_000, None, None) == ("x", "[" * 100_000)


def test_a_real_merge_and_a_real_measurement(family):
    inputs = [str(family / name) for name in ("base", "chat", "math")]
    result = run("measure", *inputs, "-o", str(family / "m.json"), "--json", "--quiet")
    measured = json.loads(result.stdout)
    result = run("merge", *inputs, "-o", str(family / "out"), "--measurement", str(family / "m.json"), "--json")
    assert result.exit_code == 0, result.stderr
    merged = json.loads(result.stdout)
    assert merged["measurement_reused"] is True
    assert merged["coefficients"] == [measured["metagpt_coefficients"]]
    result = run("merge", *inputs, "-o", str(family / "bare.safetensors"), "--granularity", "tensor")
    assert result.exit_code == 0, result.stderr
    assert "λ over 21 tensors" in result.stdout
    result = run("merge", *inputs, "-o", str(family / "out"))
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


def test_measure(calls):
    result = run("measure", "base", "chat", "math", "-o", "m.json", "--exclude", "x", "--threads", "2")
    assert result.exit_code == 0, result.output
    assert calls[0][-2] == "m.json"
    assert "saved to  m.json" in result.stdout
    assert "0.9000" in result.stdout
    assert calls[0][-1] == {
        "exclude": "x",
        "backend": "auto",
        "device": "auto",
        "device_memory": "128MiB",
        "threads": 2,
        "memory": "1GiB",
        "io": "auto",
    }
    result = run("measure", "base", "chat", "math", "--json")
    assert json.loads(result.stdout) == {"norms": [1.0, 3.0]}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_problem_with_the_work_is_one_message_and_status_1(calls, monkeypatch, as_json):
    error = PlanError("shapes differ", where="chat", got="[2]", expected="[3]", hint="use another")
    raise_in_merge(monkeypatch, error)
    result = run(*BASIC, *["--json"] * as_json)
    assert result.exit_code == 1
    assert result.stderr == "error: chat: shapes differ: got [2], expected [3]; use another\n"
    if as_json:
        assert json.loads(result.stdout) == error.to_dict()
    else:
        assert result.stdout == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_an_unexpected_exception_is_one_line(calls, monkeypatch, as_json):
    raise_in_merge(monkeypatch, ZeroDivisionError("oh\nno"))
    result = run(*BASIC, *["--json"] * as_json)
    assert result.exit_code == 1
    assert result.stderr == (
        "unexpected error: ZeroDivisionError: oh\\nno (set METAGPT_FAST_DEBUG=1 to see where it comes from)\n"
    )
    if as_json:
        assert json.loads(result.stdout)["error"] == "ZeroDivisionError"


def test_debug_shows_the_traceback(calls, monkeypatch):
    raise_in_merge(monkeypatch, OutputError("full"))
    monkeypatch.setenv("METAGPT_FAST_DEBUG", "1")
    assert isinstance(run(*BASIC).exception, OutputError)


def test_ctrl_c_is_a_short_message_and_status_130(calls, monkeypatch):
    raise_in_merge(monkeypatch, KeyboardInterrupt())
    result = run(*BASIC)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted: this run left no unfinished output behind\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "Missing argument 'BASE'"),
        (["merge", "base", "-o", "out"], "Missing argument 'MODEL"),
        (["merge", "base", "chat"], "Missing option '--out'"),
        ([*BASIC, "--dtype", "int8"], "'int8' is not one of"),
        ([*BASIC, "--memory", "lots"], "this is not a size: got 'lots'"),
        ([*BASIC, "--max-shard-size", "0"], "this is not a size: got '0'"),
        ([*BASIC, "--threads", "0"], "0 is not in the range x>=1"),
        ([*BASIC, "--coefficients", "0.5;0.5"], "expected numbers with commas"),
        ([*BASIC, "--set", "density"], "expected PARAMETER=VALUE"),
        ([*BASIC, "--set", "a=1", "--set", "a=2"], "'a' is set twice"),
        ([*BASIC, "--granularity", "row"], "'row' is not one of"),
        (["nonsense"], "No such command 'nonsense'"),
        (["demo", "--size", "huge"], "'huge' is not one of"),
    ],
)
def test_wrong_usage_is_status_2(calls, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not calls


def test_help_teaches():
    overview = run("--help").stdout
    for word in ("metagpt-fast demo", "merge ", "measure ", "info ", "METAGPT_FAST_ISA", "NO_COLOR", "130"):
        assert word in overview
    text = run("merge", "--help").stdout
    assert "λ_t = ‖θ_t − θ₀‖² / Σ_k ‖θ_k − θ₀‖²" in text
    assert "metagpt-fast merge Llama-2-7b Llama-2-7b-chat MAmmoTH-7B -o merged" in text
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Output:", "Method:", "Speed and memory:", "Display:"]
    for default in ("metagpt", "model for metagpt, else the method's", "2", "keep", "1GiB", "5GB", "auto"):
        assert f"[default: {default}]" in " ".join(text.split())
    assert "metagpt-fast measure base chat math code -o measured.json" in run("measure", "--help").stdout
    assert "random weights" in " ".join(run("demo", "--help").stdout.split())


@pytest.mark.parametrize("command", [[], ["merge"], ["measure"], ["info"], ["demo"]])
def test_help_fits_80_columns(command):
    assert max(map(len, run(*command, "--help").stdout.splitlines())) <= 80


def test_info_json():
    result = run("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout).keys() == {"versions", "machine", "kernels", "gpus", "backends"}
