"""What the commands show at the end: as tables, or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

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


def check_page(html: str, out: str, base: str, models: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse a page that a merge could not write, before the work.

    Raises:
        OutputError: the file cannot be written.
        RecipeError: the method measures nothing that the page could show.
    """
    from .errors import RecipeError
    from .page import check_page_path
    from .recipe import make_recipe

    chosen = {name: settings[name] for name in signature(make_recipe).parameters if name in settings}
    method = make_recipe(base, list(models), **chosen).method
    if not method.uses_measurement:
        raise RecipeError(
            "there is no measurement to show",
            where="--html",
            got=f"{method.name}, which measures no norms and cosines of task vectors",
            hint=f"metagpt-fast measure BASE MODEL ... --html {html}",
        )
    check_page_path(html, new_folder=out)


def save_report_page(report: MergeReport, html: str) -> None:
    """Write the page of a merge's measurement."""
    from .page import save_page

    if report.measurement is not None:  # check_page has seen to it
        save_page(report.measurement, html, report=report)


def show_report(report: MergeReport, *, as_json: bool, page: str | None = None) -> None:
    """Show a merge that is done."""
    if as_json:
        from .console import print_json, print_warnings

        print_json(report.to_dict())
        print_warnings(report.warnings)
        return
    from .tables import print_report

    print_report(report, page=page)
