"""What is printed: tables, errors, JSON and progress, on a terminal and in a pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from metagpt_fast.console import open_console, print_error, print_json, print_warnings
from metagpt_fast.errors import PlanError
from metagpt_fast.progress import BarProgress, LineProgress, Progress, open_progress
from metagpt_fast.tables import print_info, print_measurement, print_report, sparkline
from metagpt_fast.untrusted import printable

SHAPE_ERROR = PlanError(
    "tensor 'lm_head.weight' has another shape",
    where="chat/model.safetensors",
    got="[32001, 64]",
    expected="[32000, 64]",
    hint="resize it",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Forget what the terminal that runs the tests asks of rich and of this command."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "METAGPT_FAST_DEBUG", "METAGPT_FAST_ISA"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_console(width=80):
    return Console(
        file=io.StringIO(), force_terminal=True, color_system=None, width=width, highlight=False, markup=False
    )


def make_report(num_scopes=1, labels=("chat", "math", "code"), **changes):
    num_models = len(labels)
    coefficients = np.linspace(0.1, 0.9, num_scopes * num_models).reshape(num_scopes, num_models)
    facts = {
        "out": Path("merged"),
        "base": "base",
        "models": tuple(labels),
        "labels": tuple(labels),
        "method": "metagpt",
        "parameters": {"exponent": 2.0, "coefficients": None},
        "recipe": None,
        "granularity": "model" if num_scopes == 1 else "layer",
        "exclude": None,
        "out_dtype": "BF16",
        "scopes": tuple(f"layer {i}" for i in range(num_scopes)),
        "coefficients": coefficients,
        "norms": np.linspace(1, 2, num_models),
        "cosines": np.full((num_models, num_models), 0.0625),
        "base_norm": 100.0,
        "warnings": ("chat takes nearly all the weight",),
        "num_tensors": 201,
        "num_copied": 1,
        "num_parameters": 1_100_048_384,
        "nbytes_read": 17_600_000_000,
        "nbytes_written": 2_200_000_000,
        "seconds": 2.0,
        "seconds_measure": 0.8,
        "seconds_combine": 1.2,
        "backend": "cpu",
        "isa": "avx2",
        "device": "cpu",
        "device_reason": "a merge from files is bound by reading them",
        "num_threads": 2,
        "io": "mmap",
        "measurement_reused": False,
        "shards": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    return SimpleNamespace(**{**facts, **changes})


def printed(report, console=None):
    console = terminal_console() if console is None else console
    print_report(report, console)
    return console.file.getvalue()


def test_a_report_shows_every_number_and_ends_with_the_warnings():
    text = printed(make_report())
    for expected in (
        "chat   0.1000",
        "1.00 %",
        "0.062",
        "200 merged, 1 copied from the base; 1.10 B parameters, dtype BF16",
        "2.00 s (measure 800 ms, combine 1.20 s)",
        "9.90 GB/s: 17.6 GB read, 2.20 GB written",
        "cpu backend, avx2, 2 threads, mmap",
        "cpu (a merge from files is bound by reading them)",
        "metagpt; granularity model",
        "merged (2 shards)",
    ):
        assert expected in text
    assert text.rstrip().endswith("warning: chat takes nearly all the weight")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("num_scopes", "num_models"), [(1, 3), (24, 3), (300, 3), (1, 12)])
def test_tables_fit_the_terminal(width, num_scopes, num_models):
    labels = tuple(f"model-{t}" for t in range(num_models))
    text = printed(make_report(num_scopes, labels), terminal_console(width))
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) < 50


def test_a_report_by_layer_summarises_the_layers():
    text = printed(make_report(24))
    assert "λ over 24 layers" in text
    assert "█" in text
    assert text.count("chat") == 3  # λ, cosines, warning


def test_a_report_without_a_measurement_has_no_norms_and_no_cosines():
    text = printed(make_report(norms=None, cosines=None, base_norm=None))
    assert "‖τ‖" not in text
    assert "cosine" not in text


def test_zero_task_vectors_print():
    cosines = np.full((3, 3), np.nan)
    text = printed(make_report(coefficients=np.zeros((1, 3)), norms=np.zeros(3), cosines=cosines))
    assert "0.0 %" in text
    assert "nan" not in text


def test_names_reach_neither_markup_nor_the_terminal():
    text = printed(make_report(labels=("[red]a[/red]", "b\x1b[2J", "c")))
    assert "[red]a[/red]" in text
    assert "\x1b[2J" not in text
    assert "b\\x1b[2J" in text


def test_a_pipe_gets_whole_lines():
    stream = io.StringIO()
    out = Path("/very/long" * 20)
    print_report(make_report(out=out), open_console(stream))
    assert str(out) in stream.getvalue()


def test_ascii_output_has_no_bars():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    print_report(make_report(24), open_console(stream))
    print_report(make_report(1), open_console(stream))
    stream.flush()
    text = stream.buffer.getvalue().decode()
    assert "??????" not in text


def test_a_measurement_shows_coefficients_norms_cosines_and_where_it_was_saved():
    measurement = SimpleNamespace(
        labels=("chat", "math"),
        norms=np.array([3.0, 4.0]),
        cosines=np.array([[1.0, 0.25], [0.25, 1.0]]),
        base_norm=50.0,
        coefficients=lambda exponent=2.0: np.array([0.36, 0.64]),
        warnings=lambda: ("far from orthogonal",),
    )
    console = terminal_console()
    print_measurement(measurement, saved_to="m.json", console=console)
    text = console.file.getvalue()
    for expected in (
        "0.3600",
        "0.6400",
        "3.000",
        "6.00 %",
        "0.250",
        "m.json",
        "warning: far from orthogonal",
    ):
        assert expected in text


def test_info_prints_what_it_collects():
    from metagpt_fast.info import collect

    info = collect()
    json.dumps(info)
    console = terminal_console(120)
    print_info(info, console)
    text = console.file.getvalue()
    for group in ("versions", "machine", "kernels", "gpus", "backends"):
        assert f"{group}\n" in text
    assert info["kernels"]["isa"] in text


def test_info_shows_a_bad_environment_instead_of_failing(monkeypatch):
    from metagpt_fast import _native
    from metagpt_fast.errors import BackendError
    from metagpt_fast.info import collect

    def refuse():
        raise BackendError("METAGPT_FAST_ISA names 'mmx'")

    monkeypatch.setenv("METAGPT_FAST_ISA", "mmx")
    monkeypatch.setattr(_native, "isa", refuse)
    info = collect()
    assert info["kernels"]["error"] == "METAGPT_FAST_ISA names 'mmx'"
    assert "not available" in info["backends"]["cpu"]
    console = terminal_console()
    print_info(info, console)
    assert "mmx" in console.file.getvalue()


def test_info_shows_gpus():
    from metagpt_fast.info import collect

    info = {**collect(), "gpus": [{"name": "H100", "memory_nbytes": 85_000_000_000}]}
    console = terminal_console()
    print_info(info, console)
    assert "name H100, memory_nbytes 85000000000" in console.file.getvalue()


def test_an_error_is_laid_out_on_a_terminal():
    console = terminal_console()
    print_error(SHAPE_ERROR, console)
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == [
        "error: tensor 'lm_head.weight' has another shape",
        "  where       chat/model.safetensors",
        "  got         [32001, 64]",
        "  expected    [32000, 64]",
        "  what to do  resize it",
    ]


def test_an_error_is_one_line_in_a_pipe():
    stream = io.StringIO()
    print_error(SHAPE_ERROR, open_console(stream))
    assert stream.getvalue() == f"error: {SHAPE_ERROR}\n"


def test_an_error_cannot_send_escapes():
    for console in (terminal_console(), open_console(io.StringIO())):
        print_error(PlanError("bad \x1b]0;name\x07", where="\udcff"), console)
        assert "\x1b]" not in console.file.getvalue()
        assert "\\udcff" in console.file.getvalue()


def test_printable_keeps_what_people_write():
    assert printable("λ ‖τ‖ 模型 é") == "λ ‖τ‖ 模型 é"
    assert printable("a\nb\tc\x00") == "a\\nb\\tc\\x00"


def test_json_has_no_nan():
    stream = io.StringIO()
    print_json({"a": [1.0, float("nan"), (float("inf"),)], "λ": "τ"}, stream)
    assert json.loads(stream.getvalue()) == {"a": [1.0, None, [None]], "λ": "τ"}


def test_warnings_are_whole_lines_in_a_pipe():
    stream = io.StringIO()
    print_warnings(["a " * 200], open_console(stream))
    assert stream.getvalue().strip() == "warning: " + ("a " * 200).strip()


@pytest.mark.parametrize(
    ("values", "highest", "expected"),
    [
        ([0.0, 0.5, 1.0], 1.0, "▁▅█"),
        ([0.0, 0.0], 0.0, "▁▁"),
        ([-1.0, 2.0], 1.0, "▁█"),
        ([float("nan"), 1.0], 1.0, "▁█"),
    ],
)
def test_sparkline(values, highest, expected):
    assert sparkline(values, highest) == expected


def test_a_sparkline_averages_what_does_not_fit():
    assert sparkline([0.0, 1.0] * 150, 1.0, width=10) == "▅" * 10


def test_the_display_suits_the_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_progress(stream=Terminal()), BarProgress)
    assert isinstance(open_progress(stream=io.StringIO()), LineProgress)
    assert type(open_progress(quiet=True, stream=Terminal())) is Progress
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(stream=Terminal()), LineProgress)


def run_phase(progress, num_steps=4):
    with progress:
        progress.start("measure", num_steps * 1000)
        for _ in range(num_steps):
            progress.advance(1000)
        progress.finish()


def test_lines_come_at_intervals_and_at_the_end(monkeypatch):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("metagpt_fast.progress.time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    run_phase(LineProgress(stream), num_steps=4)
    assert stream.getvalue().splitlines() == [
        "measure: 50 %, 2.00 kB of 4.00 kB, 333 B/s, 6.00 s left",
        "measure: 4.00 kB in 15.0 s, 267 B/s",
    ]


def test_a_closed_stream_does_not_stop_the_work():
    stream = io.StringIO()
    stream.close()
    run_phase(LineProgress(stream, seconds_between_lines=0.0))


def test_bars_show_phase_percent_and_bytes():
    console = terminal_console()
    progress = BarProgress(io.StringIO(), console=console)
    with progress:
        for phase in ("measure", "combine"):
            progress.start(phase, 8_800_000_000)
            progress.advance(8_800_000_000)
            progress.finish()
    text = console.file.getvalue()
    *_, measure, combine = [line for line in text.splitlines() if "8.8/8.8 GB" in line]
    assert "measure" in measure
    assert "combine" in combine
    assert "100%" in combine


def test_bars_let_go_of_the_terminal_after_an_error():
    console = terminal_console()
    progress = BarProgress(io.StringIO(), console=console)
    with pytest.raises(RuntimeError), progress:
        progress.start("measure", 10)
        raise RuntimeError
    assert console.file.getvalue().endswith("\x1b[?25h")  # the cursor is visible again
