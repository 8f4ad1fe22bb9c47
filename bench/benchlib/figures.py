"""What all plots share: their look, and SVG files with the same bytes each time, which say what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchlib.rows import Result, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, REFERENCE, OTHER, ACCENT = "#2a6fbb", "#b3b3b3", "#d98032", "#d1495b"
_STYLE = {
    "svg.hashsalt": "metagpt_fast",
    "svg.fonttype": "path",  # the same picture whatever fonts the reader has
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Source:
    """A row and the result file that it is from."""

    row: Row
    result: Result
    path: Path


def load_sources(paths: Iterable[Path]) -> list[Source]:
    """Return the rows of several results; of rows with one name, the last one's.

    Raises:
        ValueError: a file is no result.
    """
    found: dict[tuple[str, str], Source] = {}
    for path in paths:
        result = Result.load(path)
        for row in result.rows:
            found[row.key] = Source(row, result, path)
    return list(found.values())


def digest(paths: Iterable[Path]) -> str:
    """Return what identifies the content of result files, by their names, in any order."""
    sha256 = hashlib.sha256()
    for path in sorted(set(paths), key=lambda path: path.name):
        sha256.update(f"{path.name}\0".encode() + path.read_bytes())
    return sha256.hexdigest()[:16]


def provenance(sources: Sequence[Source]) -> str:
    """Return the line that a picture's metadata has: its result files and their digest."""
    paths = {source.path for source in sources}
    return f"made by bench/plots.py from {', '.join(sorted(path.name for path in paths))}, sha256 {digest(paths)}"


def caption(sources: Sequence[Source]) -> str:
    """Return the machine and the commits, for the foot of a picture."""
    machines = dict.fromkeys(
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['isa'].upper()}, {machine['memory_gib']:.0f} GiB"
        for machine in (source.result.machine for source in sources)
    )
    commits = dict.fromkeys(f"{source.result.created} ({source.result.commit[:7]})" for source in sources)
    return f"{'; '.join(machines)}; measured {', '.join(sorted(commits))}"


def new_figure(width: float, height: float, num_columns: int = 1, num_rows: int = 1, **settings: object) -> Figure:
    """Return a figure of so many axes (``figure.axes``), in inches, in the style of all of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(_STYLE)
    from matplotlib import pyplot as plt

    figure, _ = plt.subplots(
        num_rows, num_columns, figsize=(width, height), squeeze=False, layout="constrained", **settings
    )
    return figure


def save(figure: Figure, sources: Sequence[Source], path: Path) -> None:
    """Write the figure on its own white background, so that it reads on dark pages too; SVG or PNG by the name."""
    from matplotlib import pyplot as plt

    figure.text(0.995, -0.005, caption(sources), ha="right", va="top", fontsize=6.5, color="#555555")
    metadata = {"Date": None, "Description": provenance(sources)} if path.suffix == ".svg" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.12, metadata=metadata, dpi=110)
    plt.close(figure)
