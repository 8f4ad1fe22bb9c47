"""Make README's tables and the plot from ``results.json``: nothing in them is written by hand.

python examples/tiny_gpt/report.py          # needs matplotlib: pip install 'metagpt_fast[examples]'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
COLOURS = {
    "MetaGPT": "#d1495b",
    "task arithmetic": "#2a6fbb",
    "TIES": "#3a8f5c",
    "DARE": "#8a63b3",
    "average": "#222222",
    "no merge": "#8a8a8a",
}
TITLES = {"equal": "all tasks trained as long", "unequal": "{} trained {} times as long"}
TASKS = ("code", "prose", "names")


def tables(results: dict[str, Any]) -> str:
    """Return everything that README shows, as Markdown."""
    parts = [_setup(results)]
    for family in TITLES:
        parts += [f"### {_title(results, family).capitalize()}", _models(results, family), _merges(results, family)]
    parts += ["### The two assumptions", _assumptions(results)]
    return "\n\n".join(parts)


def _setup(results: dict[str, Any]) -> str:
    settings, versions = results["settings"], results["versions"]
    shape, seconds = settings["shape"], [seed["seconds"] for seed in results["seeds"]]
    return (
        f"{len(seconds)} seeds; {results['num_parameters']:,} parameters ({shape['num_layers']} layers of width "
        f"{shape['width']}), float32. Base {settings['base_steps']:,} steps, tasks {settings['task_steps']:,}, "
        f"{settings['long_task']} {settings['long_steps']:,} in the second family, {settings['batch']} × "
        f"{shape['context']} characters a step. Python {versions['python']}, torch {versions['torch']}; "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a seed on one core that other work shared. Losses are nats per "
        "character on held-out text, mean ± standard deviation over the seeds."
    )


def _models(results: dict[str, Any], family: str) -> str:
    seeds = results["seeds"]
    rows = [["base", *(_spread([seed["base"][task] for seed in seeds]) for task in TASKS)]]
    for model in TASKS:
        losses = [[seed["families"][family]["models"][model][task] for seed in seeds] for task in TASKS]
        rows.append([f"fine-tuned on {model}", *map(_spread, losses)])
    return _table(["model", *TASKS], rows)


def _merges(results: dict[str, Any], family: str) -> str:
    rows = []
    for row in sorted_merges(results, family):
        losses = [f"{np.mean(row['losses'][task]):.3f}" for task in TASKS]
        rows.append([row["name"], _spread(row["ald"]), _spread(row["against"], signed=True), *losses])
    return _table(["merge, best first", "average loss difference", "against average", *TASKS], rows)


def _assumptions(results: dict[str, Any]) -> str:
    lines = []
    for family in TITLES:
        runs = [seed["families"][family] for seed in results["seeds"]]
        alphas = list(runs[0]["linearity"][TASKS[0]])
        rows = []
        for t, task in enumerate(TASKS):
            moved = _spread([run["norms"][t] / run["base_norm"] for run in runs])
            errors = [_spread([run["linearity"][task][alpha] for run in runs], 2) for alpha in alphas]
            cosines = [
                f"{other} {_spread([run['cosines'][t][k] for run in runs], 2)}"
                for k, other in enumerate(TASKS)
                if k != t
            ]
            rows.append([task, moved, *errors, ", ".join(cosines)])
        head = ["task", "‖τ‖ / ‖θ₀‖", *(f"error at α = {alpha}" for alpha in alphas), "cosines of τ"]
        lines += [f"{_title(results, family).capitalize()}:", _table(head, rows)]
    ranks = [f"{_spread(rank_correlations(results, family), 2)} ({_title(results, family)})" for family in TITLES]
    lines.append(
        "Rank correlation (Spearman) between what MetaGPT minimises, Σ_t ‖τ_t‖² ‖Σ_k λ_k τ_k − τ_t‖², and the average "
        "loss difference, over average, task arithmetic and MetaGPT with one λ per model: "
        f"{'; '.join(ranks)}."
    )
    return "\n\n".join(lines)


def sorted_merges(results: dict[str, Any], family: str) -> list[dict[str, Any]]:
    """Return each merge and each model with lists over the seeds: ``ald``, ``against`` average, ``losses``."""
    runs = [seed["families"][family]["merges"] + _unmerged(seed, family) for seed in results["seeds"]]
    average = [next(row["ald"] for row in run if row["name"] == "average") for run in runs]
    rows = []
    for same in zip(*runs, strict=True):
        ald = [row["ald"] for row in same]
        against = [value - reference for value, reference in zip(ald, average, strict=True)]
        losses = {task: [row["losses"][task] for row in same] for task in TASKS}
        rows.append({**same[0], "ald": ald, "against": against, "losses": losses})
    return sorted(rows, key=lambda row: float(np.mean(row["ald"])))


def _unmerged(seed: dict[str, Any], family: str) -> list[dict[str, Any]]:
    """Base and fine-tuned models in the place of a merge."""
    models = seed["families"][family]["models"]
    rows = []
    for name, losses in [("base", seed["base"]), *((f"fine-tuned on {task}", models[task]) for task in TASKS)]:
        ald = float(np.mean([losses[task] - models[task][task] for task in TASKS]))
        rows.append({"family": "no merge", "name": f"no merge: {name}", "losses": losses, "ald": ald})
    return rows


def rank_correlations(results: dict[str, Any], family: str) -> list[float]:
    """Return Spearman's correlation of the objective and the average loss difference, one per seed."""
    correlations = []
    for seed in results["seeds"]:
        rows = [row for row in seed["families"][family]["merges"] if "bound" in row]
        ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in ("bound", "ald")]
        correlations.append(float(np.corrcoef(*ranks)[0, 1]))
    return correlations


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the average loss differences with their spread, a panel per family."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "tiny_gpt", "font.size": 9})
    from matplotlib import pyplot as plt

    families = list(TITLES)
    num_rows = len(sorted_merges(results, families[0]))
    figure, axes = plt.subplots(1, len(families), figsize=(13, 0.8 + 0.21 * num_rows), layout="constrained")
    for axis, family in zip(axes, families, strict=True):
        rows = sorted_merges(results, family)
        for y, row in enumerate(reversed(rows)):
            colour = COLOURS[row["family"]]
            axis.plot(row["ald"], [y] * len(row["ald"]), "o", color=colour, alpha=0.35, markersize=4)
            axis.plot(np.mean(row["ald"]), y, "|", color=colour, markersize=11, markeredgewidth=2)
        axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
        for label, row in zip(axis.get_yticklabels(), reversed(rows), strict=True):
            label.set_color(COLOURS[row["family"]])
        is_positive = min(value for row in rows for value in row["ald"]) > 0
        axis.set_xscale("log" if is_positive else "symlog")
        for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            which("{x:.2g}")
        axis.tick_params(axis="x", which="both", labelsize=8)
        axis.set_xlabel("average loss difference, nats per character (logarithmic; left is better)")
        axis.set_title(_title(results, family))
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def write_readme(readme: Path, text: str) -> None:
    """Put ``text`` between the markers of README."""
    begin, end = "<!-- results -->\n", "<!-- /results -->"
    content = readme.read_text(encoding="utf-8")
    head, rest = content.split(begin, 1)
    readme.write_text(f"{head}{begin}{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def _title(results: dict[str, Any], family: str) -> str:
    settings = results["settings"]
    return TITLES[family].format(settings["long_task"], round(settings["long_steps"] / settings["task_steps"]))


def _spread(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    mean = f"{np.mean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Rewrite README's tables, and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--plot", type=Path, default=HERE / "results.svg")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    write_readme(arguments.readme, tables(results))
    plot(results, arguments.plot)


if __name__ == "__main__":
    main()
