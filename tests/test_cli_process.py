"""The command as a process of its own: start-up, exit statuses, signals, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metagpt_fast.family import PRESETS, make_family

REPOSITORY = Path(__file__).parents[1]
BASIC = ["merge", "base", "chat", "math", "-o", "out"]


def spawn(code_or_module, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *code_or_module, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        check=False,
    )


HEAVY = ("numpy", "rich", "torch", "safetensors", "triton", "transformers")


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_and_version_start_without_the_heavy_modules(arguments):
    code = (
        "import sys\nfrom metagpt_fast.cli import cli\n"
        f"try: cli({arguments!r}, prog_name='metagpt-fast')\n"
        f"except SystemExit: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = spawn(["-c", code])
    assert result.stderr == "[]\n"
    assert "metagpt-fast" in result.stdout


def test_help_answers_at_once():
    def seconds():
        started = time.perf_counter()
        assert spawn(["-m", "metagpt_fast"], "--help").returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.3


def test_statuses_of_the_real_process(tmp_path):
    assert spawn(["-m", "metagpt_fast"], "merge").returncode == 2
    missing = str(tmp_path / "missing")
    result = spawn(["-m", "metagpt_fast"], "merge", missing, missing, "-o", str(tmp_path / "out"), "--json")
    assert result.returncode == 1
    assert "missing" in json.loads(result.stdout)["message"]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["METAGPT_FAST_ISA", "METAGPT_FAST_THREADS"])
def test_variables_that_cannot_be_used_are_told_before_work_starts(tmp_path, variable):
    preset = PRESETS["tiny"]
    make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
    inputs = [str(tmp_path / name) for name in ("base", "chat")]
    for command in (["merge", *inputs, "-o", str(tmp_path / "out")], ["measure", *inputs]):
        result = spawn(["-m", "metagpt_fast"], *command, "--json", **{variable: "none"})
        assert result.returncode == 1
        assert json.loads(result.stdout)["error"] in {"BackendError", "RecipeError"}
        assert variable in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_instruction_set_that_is_none_is_told_in_python():
    code = (
        "import numpy as np, metagpt_fast as mf\n"
        "state = {'a': np.ones(3, np.float32)}\n"
        "try: mf.merge_state_dicts(state, [state])\n"
        "except mf.BackendError as error: print(error)"
    )
    result = spawn(["-c", code], METAGPT_FAST_ISA="none")
    assert result.stdout.startswith("METAGPT_FAST_ISA: got 'none', expected one of ")


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "metagpt_fast", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", ["info", "info --json", "--help", "merge base chat math code -o out --json -q"])
def test_a_full_stdout_is_one_message(tmp_path, command):
    preset = PRESETS["tiny"]
    make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "metagpt_fast", *command.split()], stdout=full, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "error: stdout: the result cannot be printed (No space left on device)\n"
    assert ("merge" in command) == (tmp_path / "out" / "model.safetensors").exists()


def test_closed_streams_are_no_error(tmp_path):
    """And what is opened does not get their numbers: what is printed would land in a checkpoint."""
    preset = PRESETS["tiny"]
    make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
    command = [sys.executable, "-m", "metagpt_fast", "merge", "base", "chat", "math", "code"]
    subprocess.run([*command, "-o", "expected", "-q"], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command, "-o", "out"], cwd=tmp_path, check=False
    )
    assert closed.returncode == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_through_the_clean_up(tmp_path, signum, status):
    marker = tmp_path / "cleaned"
    code = f"""
import sys, time, types
fake = types.ModuleType("metagpt_fast.merging")
def merge(*arguments, **settings):
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        open({str(marker)!r}, "w").close()
fake.merge = merge
sys.modules["metagpt_fast.merging"] = fake
sys.argv[1:] = {BASIC!r}
from metagpt_fast.cli import main
main()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signum)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == status
    assert marker.exists()


def test_a_merge_imports_no_torch(tmp_path):
    preset = PRESETS["tiny"]
    family = make_family(tmp_path, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)
    arguments = ["merge", str(family.base), *map(str, family.models), "-o", str(tmp_path / "out")]
    code = (
        "import sys\nfrom metagpt_fast.cli import cli\n"
        f"try: cli({arguments!r}, prog_name='metagpt-fast')\n"
        "except SystemExit as end: print(end.code, [name for name in ('torch', 'triton', 'transformers') "
        "if name in sys.modules])"
    )
    assert spawn(["-c", code]).stdout.endswith("\n0 []\n")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_many_tensors_are_not_searched_for_cycles_again_and_again(tmp_path):
    """Of all that a merge takes for 8000 tensors, the collector took a quarter."""
    header = {
        f"layers.{i}.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(8000)
    }
    text = json.dumps(header).encode()
    for name, value in (("base", b"\x80\x3f"), ("chat", b"\x00\x40")):
        (tmp_path / name).mkdir()
        content = len(text).to_bytes(8, "little") + text + value * 8000
        (tmp_path / name / "model.safetensors").write_bytes(content)
    arguments = ["merge", *(str(tmp_path / name) for name in ("base", "chat")), "-o", str(tmp_path / "out")]
    code = (
        "import gc, sys\nfrom metagpt_fast.cli import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "full = []\n"
        "gc.callbacks.append(lambda phase, facts: full.append(phase) if facts['generation'] == 2 else None)\n"
        "try: main()\nexcept SystemExit as end: status = end.code\n"
        "print('status', status, 'collections', full.count('start'))"
    )
    result = spawn(["-c", code])
    assert result.stdout.splitlines()[-1] == "status 0 collections 0", result.stderr
