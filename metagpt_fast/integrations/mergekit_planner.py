"""mergekit's planning without its merging: ``run_merge`` with an executor that takes the tasks and keeps them."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .mergekit_config import mergekit_errors
from .mergekit_tasks import run_tasks

_logger = logging.getLogger(__name__)
# The executor is a global of mergekit's module, which one merge at a time replaces.
_lock = threading.RLock()
# Where patch() keeps what it has replaced.
ORIGINAL = "_metagpt_fast_original"


def original_run_merge() -> Any:
    """Return mergekit's own ``run_merge``, within ``patch()`` too."""
    import mergekit.merge

    found = mergekit.merge.run_merge
    return getattr(found, ORIGINAL, found)


def plan_with_mergekit(
    config: Any, folder: Path, options: Any, config_source: str | None
) -> tuple[list[Any], dict[Any, Any]]:
    """Let mergekit plan, and write everything but weights into ``folder``: config, tokenizer, card.

    Args:
        config: mergekit's ``MergeConfiguration``; it is changed into a normal form.
        folder: a folder that may be written to; its name is the card's title.
        options: mergekit's ``MergeOptions``.
        config_source: the configuration's text, for the card; None for what mergekit makes of it.

    Returns:
        The ``SaveTensor`` tasks in the output's order, of each name the last one; and the ``BuildTokenizer`` task, if
        there is one, with its value.

    Raises:
        IntegrationError: mergekit does not take the configuration, or cannot read a model.
    """
    import mergekit.card
    import mergekit.merge
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.tokenizer import BuildTokenizer

    saves: dict[str, Any] = {}
    known: dict[Any, Any] = {}

    class Recorder:
        """Stands in for mergekit's executors."""

        def __init__(self, targets: list[Any], **devices: Any) -> None:
            self._others = [task for task in targets if isinstance(task, BuildTokenizer)]
            saves.update({task.tensor_name: task for task in targets if isinstance(task, SaveTensor)})

        def run(self, quiet: bool = False, desc: str | None = None) -> Iterator[tuple[Any, Any]]:
            for task, value in run_tasks(self._others, options):
                known[task] = value
                yield task, value

    folder.mkdir()
    with _lock, contextlib.ExitStack() as stack:
        # It is kept for the whole process, and would not notice that a model has been replaced since.
        LoaderCache.loaders.clear()
        stack.enter_context(_replaced(mergekit.merge, "Executor", Recorder))
        stack.enter_context(_replaced(mergekit.merge, "MultiGPUExecutor", Recorder))
        stack.enter_context(_replaced(mergekit.card, "is_hf", _is_hf(mergekit.card.is_hf)))
        stack.enter_context(mergekit_errors("planning"))
        original_run_merge()(config, str(folder), options, config_source)
    return list(saves.values()), known


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _is_hf(original: Any) -> Any:
    """Return mergekit's question to the hub, which a local folder may be named like, with an answer for no network."""

    @functools.cache
    def is_hf(path: str) -> bool:
        try:
            return bool(original(path))
        except Exception as error:  # of three libraries, and none of them worth a merge
            _logger.warning("the card does not link to %s: the hub does not answer (%s)", path, error)
            return False

    return is_hf
