"""Prints what was measured, how well it predicts a merge, and what it predicts for real models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from ..console import open_console, print_warnings
from ..quantities import format_nbytes, format_seconds
from ..table_parts import make_table
from ..untrusted import printable
from .prediction import BUS, DISK_READ, DISK_WRITE, KERNELS, MEMORY
from .work import NUM_MODELS

if TYPE_CHECKING:
    from rich.console import Console

    from .prediction import Prediction
    from .run import BenchResult, Forecast


def print_bench(result: BenchResult, console: Console | None = None) -> None:
    """Print all of it to stdout, the answer last but for the warnings."""
    console = open_console() if console is None else console
    _print_rates(console, result)
    _print_checks(console, result)
    _print_forecasts(console, result)
    print_warnings(result.warnings, console)


def advice(result: BenchResult, bottleneck: str) -> str:
    """Return what a bottleneck means on this machine, and what would help."""
    rates, threads = result.rates, _threads(result)
    to_gpu = _rate(rates.bus.to_device if rates.bus else 0)
    cached, memory = _rate(rates.cache_read), _rate(rates.memory_read)
    sentences = {
        DISK_READ: f"files come from the disk at {_rate(rates.disk_read)}, and a merge could take {cached}. A faster "
        "disk would help, or less to read: --granularity layer reads every file once, not twice.",
        DISK_WRITE: f"a new file reaches the disk at {_rate(rates.disk_write)}. A faster disk for the output would "
        "help; --no-sync does not wait for it.",
        MEMORY: f"of files that are in memory {threads} can take {cached}, and memory gives {memory}. More cores "
        "or faster memory would help, a faster disk would not.",
        KERNELS: f"the {result.isa} kernels take {_rate(rates.layer_gram)} of the {memory} that memory gives, with "
        f"{threads}. More cores would help, a faster disk would not.",
        BUS: f"the bus to the GPU carries {to_gpu}. --device cpu does without.",
    }
    return sentences[bottleneck]


def _print_rates(console: Console, result: BenchResult) -> None:
    rates = result.rates
    _print_title(
        console,
        "Measured",
        f"in {printable(str(Path(result.folder).resolve()))}, {format_nbytes(result.files_nbytes)} of files; "
        f"{_threads(result)}, {result.isa}",
    )
    table = make_table("", "speed", " ", left=("", " "))
    gram, merge = rates.layer_gram / rates.memory_read, rates.layer_merge / rates.memory_triad
    for name, rate, note in (
        ("memory, read", rates.memory_read, ""),
        ("memory, read and write", rates.memory_triad, "a = b + 3·c"),
        ("kernel layer_gram", rates.layer_gram, f"{100 * gram:.0f} % of memory, read"),
        ("kernel layer_merge", rates.layer_merge, f"{100 * merge:.0f} % of memory, read and write"),
        ("files, read", rates.disk_read, "from the disk" if result.is_cold else "from memory: not a disk's speed"),
        ("files, read again", rates.cache_read, "from the page cache"),
        ("files, written", rates.cache_write, "into the page cache"),
        ("files, written", rates.disk_write, "until they are on the disk"),
    ):
        table.add_row(name, _rate(rate), note)
    if rates.bus is not None:
        table.add_row("bus to the GPU", _rate(rates.bus.to_device), rates.bus.name)
        table.add_row("bus from the GPU", _rate(rates.bus.to_host), "")
    console.print(table)
    console.print(f"Reading and writing at once takes {_at_once(rates.sharing)}.")
    if rates.bus is None:
        console.print(f"No GPU: {printable(result.gpu)}", soft_wrap=not console.is_terminal)


def _at_once(sharing: float) -> str:
    """Return in words how long a read and a write take that begin together."""
    if sharing < 0.1:
        return "as long as the longer of the two"
    return "as long as one after the other" if sharing > 0.9 else f"the longer time and {sharing:.0%} of the shorter"


def _print_checks(console: Console, result: BenchResult) -> None:
    _print_title(console, "Check", f"merges of those files, base + {NUM_MODELS} models")
    table = make_table("granularity", "inputs", "predicted", "measured", "ratio", left=("granularity", "inputs"))
    for check in result.checks:
        table.add_row(
            check.granularity,
            "cached" if check.is_warm else "on the disk",
            format_seconds(check.predicted.seconds),
            format_seconds(check.seconds),
            Text(f"{check.ratio:.2f}", style="" if check.is_close else "bold yellow"),
        )
    console.print(table)


def _print_forecasts(console: Console, result: BenchResult) -> None:
    _print_title(
        console,
        "Predicted",
        f"base + {NUM_MODELS} models in bf16, the inputs on the disk; "
        f"{format_nbytes(result.cache_nbytes)} of memory for the page cache",
    )
    has_warm = any(each.warm is not None for each in result.forecasts)
    has_gpu = result.rates.bus is not None
    table = make_table(
        "model", "inputs", *(["device"] if has_gpu else []), "granularity", "time", "second read",
        *(["inputs cached"] if has_warm else []), "waits for", left=("model", "device", "granularity", "waits for"),
    )  # fmt: skip
    before = ""
    for each in result.forecasts:
        is_new, before = each.model != before, each.model
        table.add_row(
            each.model if is_new else "",
            format_nbytes(each.nbytes_in) if is_new else "",
            *([each.device.partition(" ")[0]] if has_gpu else []),
            each.granularity,
            Text(format_seconds(each.cold.seconds), style="bold"),
            second_read(each),
            *(["–" if each.warm is None else format_seconds(each.warm.seconds)] if has_warm else []),
            _waits_for(each.cold),
        )
    console.print(table)
    for bottleneck in dict.fromkeys(each.cold.bottleneck for each in result.forecasts):
        console.print(f"{bottleneck}: {advice(result, bottleneck)}", soft_wrap=not console.is_terminal)


def second_read(forecast: Forecast) -> str:
    """Return where the second read of the files finds them, in words; with layers it follows the first at once."""
    again, cached = forecast.cold.nbytes_again, forecast.cold.nbytes_again_cached
    if again == 0:
        return "none"
    share = cached / again
    return "warm" if share > 0.995 else "cold" if share < 0.005 else f"{100 * share:.0f} % warm"


def _waits_for(prediction: Prediction) -> str:
    """Return the bottleneck, and how much of the time it is."""
    return f"{prediction.bottleneck}, {100 * prediction.parts[prediction.bottleneck] / prediction.seconds:.0f} %"


def _threads(result: BenchResult) -> str:
    return f"{result.num_threads} thread{'s' if result.num_threads > 1 else ''}"


def _rate(nbytes_per_second: float) -> str:
    return f"{format_nbytes(nbytes_per_second)}/s"


def _print_title(console: Console, title: str, conditions: str) -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), (f"  {conditions}", "dim")), soft_wrap=not console.is_terminal)
