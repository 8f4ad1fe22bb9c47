"""What the commands show at the end: as tables, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .output_shards import OutputShard
    from .plan import MergePlan
    from .report import MergeReport


def show_plan(
    plan: MergePlan,
    shards: Sequence[OutputShard],
    out: str,
    *,
    as_json: bool,
    by_tensor: bool = False,
    is_measured: bool = False,
) -> None:
    """Show a dry run.

    ``by_tensor`` lists every tensor with its sources, method and parameters; ``is_measured``: a measurement is reused.
    """
    if as_json:
        from .console import print_json

        files = [{"name": shard.file_name, "nbytes": shard.nbytes} for shard in shards]
        measured = {"nbytes_measured": 0} if is_measured else {}
        print_json({**plan.to_dict(), **measured, "measurement_reused": is_measured, "out": out, "shards": files})
        return
    from .tables import print_plan

    print_plan(plan, shards, out, by_tensor=by_tensor, is_measured=is_measured)


def show_report(report: MergeReport, *, as_json: bool) -> None:
    """Show a merge that is done."""
    if as_json:
        from .console import print_json, print_warnings

        print_json(report.to_dict())
        print_warnings(report.warnings)
        return
    from .tables import print_report

    print_report(report)
