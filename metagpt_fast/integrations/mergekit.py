"""mergekit plans, metagpt_fast executes: ``run_merge`` with mergekit's signature, and ``patch()`` for mergekit itself.

mergekit's ``run_merge`` runs as it is, with an executor in place of its own that takes the planned tasks and merges
nothing yet, into a temporary folder, where it leaves config, tokenizer and card. Then the tasks become a plan of ours
(:mod:`.mergekit_plan`), what the engine cannot take is computed by mergekit's tasks (:mod:`.mergekit_tasks`), and the
plan is carried out as any other: the output appears when it is whole.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RecipeError
from ..merging import DEFAULT_MEMORY, carry_out
from ..methods.metagpt import MetaGPT
from ..output_target import check_replaceable, is_file_target, real_target
from ..plan import ToolPart
from .mergekit_config import Extras, check_version, extras_of, with_weight
from .mergekit_method import register
from .mergekit_plan import Split, make_plan, split_tasks
from .mergekit_planner import ORIGINAL, original_run_merge, plan_with_mergekit
from .mergekit_sources import Sources
from .mergekit_tasks import compute

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..layer_pass import Progress
    from ..report import MergeReport

__all__ = ["FastMerge", "patch", "register", "run_merge"]

_logger = logging.getLogger(__name__)
_UNLIMITED = 2**63 - 1


@dataclass(frozen=True)
class FastMerge:
    """What a merge has done.

    Attributes:
        report: of the merge; None if mergekit has done all of it (``safe_serialization=False``).
        num_tensors: tensors of the output that the engine has merged.
        by_mergekit: names of the tensors that mergekit has computed, by the reason.
        seconds_planned: wall time until mergekit's plan was there.
        seconds: wall time of all.
    """

    report: MergeReport | None
    num_tensors: int
    by_mergekit: dict[str, tuple[str, ...]]
    seconds_planned: float
    seconds: float

    @property
    def summary(self) -> str:
        """Return how many tensors went which way and why, in a sentence."""
        num_others = sum(len(names) for names in self.by_mergekit.values())
        text = f"{self.num_tensors} tensors merged by metagpt_fast, {num_others} by mergekit's own tasks"
        reasons = [f"{len(names)}: {reason}" for reason, names in self.by_mergekit.items()]
        return f"{text} ({'; '.join(reasons)})" if reasons else text


def run_merge(
    merge_config: Any,
    out_path: str,
    options: Any,
    config_source: str | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    memory: str | int = DEFAULT_MEMORY,
    sync: bool = True,
    progress: Progress | None = None,
) -> FastMerge:
    """Merge as ``mergekit.merge.run_merge`` does, with the engine of this package.

    Args:
        merge_config: mergekit's ``MergeConfiguration``.
        out_path: the output folder.
        options: mergekit's ``MergeOptions``.
        config_source: the configuration's text, for the card.
        overwrite: replace a model that is already there, once the new one is whole; mergekit would mix the two.
        resume: go on with the same merge where it was interrupted, if it was. mergekit plans again, and computes again
            what the engine cannot take; if other bytes come out, resuming is refused.
        memory: bound of the memory that mapped files may take.
        sync: wait until everything is on the disk, which mergekit does not do.
        progress: what is told how far the work is.

    Returns:
        What was done. With ``safe_serialization=False`` all of it by mergekit: pickle files are not written here.

    Raises:
        IntegrationError: mergekit is missing or of another version, or does not take the configuration.
        MetagptFastError: as :func:`metagpt_fast.merge`.
    """
    started = time.perf_counter()
    register()
    from mergekit import merge_methods

    target = Path(out_path)
    _check_target(target, overwrite=overwrite)
    text = config_source or merge_config.to_yaml()
    spec = merge_methods.get(merge_config.merge_method).spec
    extras = extras_of(merge_config, [parameter.name for parameter in spec.parameters])
    if not options.safe_serialization:
        return _with_pickles(merge_config, out_path, options, config_source, extras, started)
    config = merge_config
    if extras.computes_weights:
        config, config_source = with_weight(merge_config), text
    with _work_folder(target) as folder:
        companions = folder / (target.name or real_target(target).name)
        saves, known = plan_with_mergekit(config, companions, options, config_source)
        seconds_planned = time.perf_counter() - started
        sources = Sources(next(iter(known.values()), None))
        split = split_tasks(saves, sources, extras, options.random_seed)
        scratch = folder / "computed"
        scratch.mkdir()
        computed = compute((save for save, _ in split.rest), options, scratch, known)
        by_mergekit = _by_reason(split, computed)
        record = {
            "name": "mergekit",
            "version": check_version(),
            "num_tensors": len(split.tensors),
            "by_mergekit": {reason: list(names) for reason, names in by_mergekit.items()},
            "seconds_planned": seconds_planned,
        }
        plan = make_plan(config, split, sources, extras, computed, text)
        report = carry_out(
            replace(plan, tool=ToolPart(_files_in(companions), record, computed)),
            target,
            threads=options.num_threads,
            memory=memory,
            max_shard_size=options.out_shard_size if options.out_shard_size > 0 else _UNLIMITED,
            overwrite=overwrite,
            resume=resume,
            sync=sync,
            progress=progress,
            started=started,
        )
    return FastMerge(report, len(split.tensors), by_mergekit, seconds_planned, time.perf_counter() - started)


@contextmanager
def patch(
    *, overwrite: bool = False, resume: bool = False, memory: str | int = DEFAULT_MEMORY, sync: bool = True
) -> Iterator[None]:
    """Within this context ``mergekit.merge.run_merge`` uses the engine, wherever in mergekit it is called.

    For all threads. ``overwrite``, ``resume``, ``memory`` and ``sync`` are as in :func:`run_merge`. What a merge has
    done goes to the log.

    Raises:
        IntegrationError: mergekit is missing, or of a version that is not supported.
    """
    register()
    original = original_run_merge()

    def fast_run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        merged = run_merge(
            merge_config, out_path, options, config_source,
            overwrite=overwrite, resume=resume, memory=memory, sync=sync,
        )  # fmt: skip
        _logger.info("%s", merged.summary)
        for warning in merged.report.warnings if merged.report is not None else ():
            _logger.warning("%s", warning)

    setattr(fast_run_merge, ORIGINAL, original)
    _rebind(original, fast_run_merge)
    try:
        yield
    finally:
        _rebind(fast_run_merge, original)


def _rebind(old: Any, new: Any) -> None:
    """Put ``new`` where mergekit's modules have ``old`` under the name run_merge."""
    for name, module in list(sys.modules.items()):
        if (name == "mergekit" or name.startswith("mergekit.")) and getattr(module, "run_merge", None) is old:
            module.run_merge = new  # type: ignore[attr-defined]


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse an output before mergekit plans, which takes seconds, or merges adapters, which takes minutes."""
    if is_file_target(target):
        raise OutputError("the output is a folder", where=target, hint="choose a name without .safetensors")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)  # as mergekit does
    check_replaceable(real_target(target), overwrite=overwrite)


def _with_pickles(
    config: Any, out_path: str, options: Any, config_source: str | None, extras: Extras, started: float
) -> FastMerge:
    """Let mergekit write pickle files, which this package does not."""
    if extras.parameters or extras.granularity or config.merge_method == MetaGPT.name:
        raise RecipeError(
            "pickle files are written by mergekit, which has not all that is asked for",
            where="safe_serialization",
            got="false",
            expected="true",
        )
    original_run_merge()(config, out_path, options, config_source)
    return FastMerge(None, 0, {}, 0.0, time.perf_counter() - started)


def _by_reason(split: Split, computed: Checkpoint | None) -> dict[str, tuple[str, ...]]:
    """Return the names of the tensors that mergekit has made, without optional ones that turned out to be nothing."""
    reasons: dict[str, list[str]] = {}
    for save, reason in split.rest:
        if computed is not None and save.tensor_name in computed.tensors:
            reasons.setdefault(reason, []).append(save.tensor_name)
    return {reason: tuple(names) for reason, names in reasons.items()}


def _files_in(folder: Path) -> tuple[tuple[str, bytes | Path], ...]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), path) for path in files)


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside the output, and remove it with all it holds."""
    real = real_target(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{real.name}.mergekit-", dir=real.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
