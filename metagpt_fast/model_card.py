"""The model card (README.md) of an output: what was merged and how, safe to publish.

Names and paths come from strangers' files, and the card is rendered on web pages: no name can break a table,
the front matter or a code block, or become a link, and no local path of the user is shown.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from .methods import METHODS, changed_parameters
from .quantities import format_count

if TYPE_CHECKING:
    from .report import MergeReport

# The Hugging Face hub refuses an upload whose card has a base_model of another form.
_HUB_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_OPTIONS = {"exponent": "--exponent", "weight": "--coefficients", "coefficients": "--coefficients"}
_GENERAL_EQUATION = "θ = θ₀ + Σ_t λ_t τ_t,  τ_t = θ_t − θ₀"
# Where a method's own line would not say it in the symbols of the general equation.
_COEFFICIENT_EQUATIONS = {
    "metagpt": "λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖²",
    "task_arithmetic": "λ_t as given",
    "linear": "λ_t = w_t / Σ_k w_k",
}


def model_card(report: MergeReport) -> str:
    """Return the card as Markdown with YAML front matter."""
    names = _display_names(report)
    sections = [
        _front_matter(report),
        f"# {_code(report.out.name)}",
        f"Merged with metagpt_fast from {len(names)} fine-tuned {'model' if len(names) == 1 else 'models'} "
        f"of the base model {_code(model_id(report.base))}.",
        _method(report),
        "## Coefficients",
        _coefficients(report, names),
    ]
    if report.cosines is not None and len(names) > 1:
        rows = [[name, *(_number(x) for x in row)] for name, row in zip(names, report.cosines, strict=True)]
        sections += [
            "## Cosines between the task vectors",
            "The derivation of the method takes task vectors as orthogonal, that is, cosines near 0.",
            _table(["model", *map(_code, names)], rows),
        ]
    if report.warnings:
        sections += [
            "## Warnings",
            _fence("text", (without_paths(text, report) for text in report.warnings)),
        ]
    sections.append("## Reproduce")
    if report.recipe is not None:
        lines = without_paths(report.recipe, report).rstrip().splitlines()
        sections += ["With `recipe.yaml`:", _fence("yaml", lines)]
    sections += [
        _fence("sh", [_command(report)]),
        "Fingerprints of the inputs, versions and all numbers are in `metagpt_fast.json`.",
    ]
    return "\n\n".join(sections) + "\n"


def model_id(path: str) -> str:
    """Return ``ORG/NAME`` for a path in a Hugging Face cache, otherwise the name of the folder or file."""
    parts = PurePath(path).parts
    for folder, below in pairwise(parts):
        if folder.startswith("models--") and below == "snapshots":
            return folder.removeprefix("models--").replace("--", "/")
    name = PurePath(path).name
    return name if name not in {"", ".", ".."} else Path(path).resolve().name


def equation(report: MergeReport) -> str:
    """Return what the method computes, in one line."""
    exponent = report.parameters.get("exponent", 2)
    if report.method == "metagpt" and exponent != 2:
        return f"{_GENERAL_EQUATION},  λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p,  p = {exponent}"
    if report.method == "linear" and report.parameters.get("normalize") is False:
        return "θ = Σ_t w_t θ_t,  w_t as given"
    coefficients = _COEFFICIENT_EQUATIONS.get(report.method)
    if coefficients is None and report.method in METHODS:
        return METHODS[report.method].equation
    return f"{_GENERAL_EQUATION},  {coefficients}" if coefficients else _GENERAL_EQUATION


def _front_matter(report: MergeReport) -> str:
    ids = [model_id(path) for path in (report.base, *report.models)]
    items = [f'- "{name}"' for name in ids if _HUB_ID.fullmatch(name)]
    lines = ["---", *(["base_model:", *items] if items else [])]
    lines += ["library_name: transformers", "tags:", "- merge", "- metagpt_fast", "---"]
    return "\n".join(lines)


def _display_names(report: MergeReport) -> list[str]:
    """The ids of the models, or their labels where two ids are the same."""
    ids = [model_id(path) for path in report.models]
    count = Counter(ids)
    return [label if count[name] > 1 else name for name, label in zip(ids, report.labels, strict=True)]


def _method(report: MergeReport) -> str:
    merged = report.num_tensors - report.num_copied
    lines = [
        f"- method: {_code(report.method)}, granularity {_code(report.granularity)}",
        f"- equation: {_code(equation(report))}",
        f"- tensors: {merged} merged, {report.num_copied} copied from the base; "
        f"{format_count(report.num_parameters)} parameters; dtype {_code(report.out_dtype)}",
    ]
    if report.exclude is not None:
        lines.append(f"- excluded from the merge: {_code(report.exclude, in_table=False)}")
    return "\n".join(lines)


def _coefficients(report: MergeReport, names: list[str]) -> str:
    table = report.coefficients
    if len(report.scopes) == 1:
        header = ["model", "λ"]
        columns = [table[0]]
        note = ""
    else:
        header = ["model", "λ min", "λ mean", "λ max"]
        columns = [table.min(axis=0), table.mean(axis=0), table.max(axis=0)]
        note = f"\n\nOver {len(report.scopes)} scopes; the coefficients of each are in `metagpt_fast.json`."
    if report.norms is not None:
        header.append("‖τ‖")
        columns.append(report.norms)
        if report.base_norm:
            header.append("‖τ‖ / ‖θ₀‖")
            columns.append(report.norms / report.base_norm)
    rows = [[name, *(_number(column[t]) for column in columns)] for t, name in enumerate(names)]
    return _table(header, rows) + note


def _command(report: MergeReport) -> str:
    """The command line, with ids and folder names in place of the user's paths."""
    if report.recipe is not None:
        return shlex.join(["metagpt-fast", "run", "recipe.yaml", _argument(report.out.name)])
    inputs = [_argument(model_id(path)) for path in (report.base, *report.models)]
    words = ["metagpt-fast", "merge", *inputs, "-o", _argument(report.out.name)]
    options = {"--method": report.method, "--granularity": report.granularity}
    for name, value in changed_parameters(report.method, report.parameters).items():
        text = _value(value)
        if name in _OPTIONS:
            options[_OPTIONS[name]] = text
        else:
            words += ["--set", f"{name}={text}"]
    if report.exclude is not None:
        options["--exclude"] = report.exclude
    if report.out_dtype != "keep":
        options["--dtype"] = report.out_dtype
    for option, value in options.items():
        words += [f"{option}={value}"] if value.startswith("-") else [option, value]
    return shlex.join(words)


def _argument(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def without_paths(text: str, report: MergeReport) -> str:
    """Replace the paths of inputs and output by their ids: the longest first, as one may contain another."""
    ids = {str(report.out): report.out.name}
    ids |= {spelling: model_id(p) for p in (report.base, *report.models) for spelling in (p, str(PurePath(p)))}
    for path in sorted(ids, key=len, reverse=True):
        if "/" in path:
            text = text.replace(path, ids[path])
    return text


def _number(value: float) -> str:
    return f"{value:.6g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of names in the first column and numbers in the others."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *([_code(row[0]), *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str, *, in_table: bool = True) -> str:
    """``text`` as a code span, in which nothing is a link or markup.

    The characters that could end the span or a table's cell are replaced by others that look alike, because
    Markdown readers disagree about how to escape them. The exact text is in ``metagpt_fast.json``.
    """
    shown = _visible(text).replace("`", "'")
    if in_table:
        shown = shown.replace("|", "¦")
    return f"`{shown or '?'}`"


def _visible(text: str) -> str:
    """Replace line breaks, control and direction-changing characters, and what no font shows."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _fence(language: str, lines: Iterable[str]) -> str:
    """A code block, with more backticks around it than there are together in it."""
    content = "\n".join(_visible(line) for line in lines)
    ticks = "```"
    while ticks in content:
        ticks += "`"
    return f"{ticks}{language}\n{content}\n{ticks}"
