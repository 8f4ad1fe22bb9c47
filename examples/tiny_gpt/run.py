"""Train a small GPT, fine-tune it on three tasks, merge with every method, and measure what the merges cost each task.

    python examples/tiny_gpt/run.py                       # 4 seeds, minutes on two cores
    python examples/tiny_gpt/run.py --seeds 1             # a first look
    python examples/tiny_gpt/run.py --smoke --out /tmp/x  # seconds; the numbers mean nothing

Writes ``results.json``; ``report.py`` makes the tables and the plot from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assumptions import linearity_errors
from gpt import Shape, TinyGPT, evaluate, load, save, train
from merges import Merge, measure, merges, run_merge
from texts import TASKS, Tokens, load_texts

import metagpt_fast

HERE = Path(__file__).resolve().parent
Texts = Mapping[str, Mapping[str, Tokens]]


@dataclass(frozen=True)
class Settings:
    """How long and how fast is trained; ``long_steps`` is for the task that is trained longer in the second family."""

    shape: Shape
    base_steps: int = 1000
    base_rate: float = 2e-3
    task_steps: int = 150
    task_rate: float = 5e-4
    long_task: str = "names"
    long_steps: int = 600
    batch: int = 16
    num_windows: int = 96


SMOKE = Settings(Shape(width=16, num_layers=1, num_heads=2, context=32), 3, 1e-3, 2, 1e-3, "names", 4, 2, 2)


def run_seed(seed: int, texts: Texts, settings: Settings, chosen: Sequence[Merge], folder: Path) -> dict[str, Any]:
    """Return what one seed gives: losses of base, models and merges, and the checks of the assumptions."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    base = TinyGPT(settings.shape)
    train_loss = train(
        base,
        texts["base"]["train"],
        steps=settings.base_steps,
        rate=settings.base_rate,
        batch=settings.batch,
        seed=seed,
    )
    save(base, folder / "base")
    print(f"seed {seed}: base trained, loss {train_loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    steps = dict.fromkeys(TASKS, settings.task_steps)
    for name, num_steps in [*steps.items(), (f"{settings.long_task}-long", settings.long_steps)]:
        model = load(folder / "base")
        text = texts[name.removesuffix("-long")]["train"]
        train(model, text, steps=num_steps, rate=settings.task_rate, batch=settings.batch, seed=1000 + seed)
        save(model, folder / name)
    seconds_training = time.perf_counter() - started
    families = {
        "equal": list(TASKS),
        "unequal": [f"{task}-long" if task == settings.long_task else task for task in TASKS],
    }
    result: dict[str, Any] = {"seed": seed, "base": _losses(folder / "base", texts, settings), "families": {}}
    for family, names in families.items():
        result["families"][family] = _run_family(folder, names, texts, settings, chosen)
    result["seconds_training"] = round(seconds_training, 1)
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(f"seed {seed}: done, {result['seconds']:.0f} s", flush=True)
    return result


def _run_family(
    folder: Path, names: Sequence[str], texts: Texts, settings: Settings, chosen: Sequence[Merge]
) -> dict[str, Any]:
    paths = [folder / name for name in names]
    models = {task: _losses(path, texts, settings) for task, path in zip(TASKS, paths, strict=True)}
    measured = measure(folder / "base", paths, folder / "measured.html")
    result: dict[str, Any] = {
        "models": models,
        "norms": measured["norms"],
        "base_norm": measured["base_norm"],
        "cosines": measured["cosines"],
        "linearity": {
            task: linearity_errors(folder / "base", path, texts[task]["test"])
            for task, path in zip(TASKS, paths, strict=True)
        },
        "merges": [],
    }
    own = [models[task][task] for task in TASKS]
    for merge in chosen:
        report = run_merge(folder / "base", paths, folder / "merged", merge.options)
        losses = _losses(folder / "merged", texts, settings)
        row = {"family": merge.family, "name": merge.name, "options": list(merge.options), "losses": losses}
        row["ald"] = float(np.mean([losses[task] - own[t] for t, task in enumerate(TASKS)]))
        if len(report["scopes"]) == 1 and merge.family in {"average", "task arithmetic", "MetaGPT"}:
            row["coefficients"] = report["coefficients"][0]
            row["bound"] = _objective(row["coefficients"], measured["norms"], measured["cosines"])
        result["merges"].append(row)
    return result


def _losses(folder: Path, texts: Texts, settings: Settings) -> dict[str, float]:
    model = load(folder)
    return {task: evaluate(model, texts[task]["test"], settings.num_windows) for task in TASKS}


def _objective(coefficients: Sequence[float], norms: Sequence[float], cosines: Sequence[Sequence[float]]) -> float:
    """What MetaGPT minimises: Σ_t ‖τ_t‖² ‖Σ_k λ_k τ_k − τ_t‖² (docs/method.md), from the Gram matrix."""
    gram = np.outer(norms, norms) * np.array(cosines)
    differences = np.array(coefficients)[None, :] - np.eye(len(norms))
    squares = np.einsum("tk,kl,tl->t", differences, gram, differences)
    return float(np.square(norms) @ squares)


def main() -> None:
    """Run every seed and save after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each with one thread")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="file of the results")
    parser.add_argument("--keep", type=Path, help="folder that keeps every seed's checkpoints, and the page about them")
    parser.add_argument("--smoke", action="store_true", help="a few steps and merges, to see that it runs")
    arguments = parser.parse_args()
    settings, chosen = Settings(Shape()), merges()
    if arguments.smoke:
        settings, chosen = SMOKE, [merge for merge in chosen if merge.name in SMOKE_MERGES]
    texts = _texts(settings)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "num_parameters": sum(parameter.numel() for parameter in TinyGPT(settings.shape).parameters()),
        "characters": {name: {part: len(text) for part, text in parts.items()} for name, parts in texts.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "metagpt_fast": metagpt_fast.__version__,
        },
        "machine": {"jobs": arguments.jobs, "platform": platform.platform()},
        "seeds": [],
    }
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as executor:
        jobs = [executor.submit(_job, seed, settings, chosen, arguments.keep) for seed in range(arguments.seeds)]
        for job in jobs:
            results["seeds"].append(job.result())
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def _job(seed: int, settings: Settings, chosen: Sequence[Merge], keep: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tiny-gpt-") as folder:
        result = run_seed(seed, _texts(settings), settings, chosen, Path(folder))
        if keep is not None:
            shutil.copytree(folder, keep / f"seed-{seed}")
    return result


def _texts(settings: Settings) -> dict[str, dict[str, Tokens]]:
    return load_texts(60 if settings == SMOKE else None)


SMOKE_MERGES = {"average", "task arithmetic, λ = 0.3", "TIES, density 0.5, λ = 1.0", "MetaGPT, model, p = 2"}

if __name__ == "__main__":
    main()
