"""What README and docs promise: options, variables, examples and links are those of the code."""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from dataclasses import replace
from pathlib import Path

import click
import pytest

from metagpt_fast.cli import cli
from metagpt_fast.family import PRESETS, make_family

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
# Read by libraries on our behalf: rich looks for it.
READ_ELSEWHERE = {"NO_COLOR"}
OTHER_TOOLS = ("mergekit", "sd_mecha", "fusion_bench")


def text_of(page):
    return page.read_text(encoding="utf-8")


def options_of(name):
    """Return every spelling of every option of a command, or of the command itself for None."""
    command = cli if name is None else cli.commands[name]
    parameters = command.get_params(click.Context(command, info_name=name))
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    return {spelling for option in options for spelling in (*option.opts, *option.secondary_opts)} | {"-h", "--help"}


def commands_in(text):
    """Yield each line of a page that begins a metagpt-fast command, without comments, the prompt and back-ticks."""
    for line in text.splitlines():
        for match in re.finditer(r"(?:^|[ `/])metagpt-fast ([^`#|]*)", line):
            yield match.group(1).strip()


def table_rows(text, heading):
    """Return the cells of the table whose heading row begins with ``heading``."""
    rows = text.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def mergekits_options():
    """Return every spelling of the options of mergekit-yaml-fast, most of which are mergekit's."""
    if importlib.util.find_spec("mergekit") is None:
        pytest.skip("pip install '.[mergekit]'")
    from metagpt_fast.integrations import mergekit_cli

    command = mergekit_cli._command()
    return {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    everywhere = set().union(*(options_of(name) for name in (None, *cli.commands)))
    everywhere |= mergekits_options() if page.stem == "integrating" else set()
    text = text_of(page)
    for command in commands_in(text):
        name, *_ = command.split() or [""]
        known = options_of(name) if name in cli.commands else options_of(None)
        unknown = set(OPTION.findall(command)) - known
        assert not unknown, f"metagpt-fast {command}"
    for span in CODE_SPAN.findall(FENCE.sub("", text)):
        if span.startswith("--"):
            assert OPTION.match(span).group() in everywhere, span


def test_commands_are_named():
    names = {command.split()[0] for command in commands_in(text_of(README)) if command}
    assert set(cli.commands) <= names
    assert {name for name in names if name.isalpha()} <= set(cli.commands) | {"COMMAND"}


def test_the_table_of_options_is_complete():
    listed = {option for row in table_rows(text_of(README), "option") for option in OPTION.findall(row[0])}
    assert listed == options_of("merge")


def test_defaults_in_the_table_are_those_of_the_command():
    options = {spelling: option for option in cli.commands["merge"].params for spelling in option.opts}
    for names, default, _ in table_rows(text_of(README), "option"):
        option = options.get(OPTION.findall(names)[-1])  # --help is not among the parameters
        if default.startswith("`"):
            assert default.strip("`") == option.default, names
        elif option is not None:
            assert option.is_flag == (default == "off"), names
            assert option.required == (default == "required"), names


def test_the_table_of_variables_is_complete():
    """Every name in capitals, quoted on a line that reads or sets the environment, is in the table; and no other."""
    sources = [ROOT / "setup.py"]
    sources += [path for folder in ("metagpt_fast", "csrc") for path in (ROOT / folder).rglob("*.*")]
    read = set()
    for path in sources:
        if path.suffix in {".py", ".cpp", ".h"}:
            for line in path.read_text(encoding="utf-8").splitlines():
                if re.search(r"\benviron\b|\bgetenv\b", line):
                    without_defaults = re.sub(r"(environ\.(?:get|setdefault)\([^,()]+),[^()]*\)", r"\1)", line)
                    read.update(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", without_defaults))
    listed = [row[0].strip("`") for row in table_rows(text_of(README), "environment variable")]
    assert len(listed) == len(set(listed))
    assert set(listed) == read | READ_ELSEWHERE


@pytest.mark.parametrize("name", ["bench-table", "test-command"])
def test_markers(name):
    text = text_of(README)
    begin, end = f"\n<!-- {name} -->\n", f"\n<!-- /{name} -->\n"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)
    assert text[text.index(begin) + len(begin) : text.index(end)].strip()


def test_the_test_command_is_one_fenced_command():
    inner = text_of(README).split("<!-- test-command -->")[1].split("<!-- /test-command -->")[0]
    ((language, command),) = FENCE.findall(inner)
    assert language == "sh"
    assert len(command.splitlines()) == 1
    assert FENCE.sub("", inner).strip() == ""


def make_tiny(folder):
    preset = PRESETS["tiny"]
    make_family(folder, shape=preset.shape, max_shard_nbytes=preset.max_shard_nbytes, seed=0)


EXAMPLES = [
    pytest.param(body, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (language, body) in enumerate(FENCE.findall(text_of(page)))
    if language == "python"
]


def test_there_are_python_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples_run(example, tmp_path, monkeypatch):
    make_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        for tool in OTHER_TOOLS:
            if f"import {tool}" in example or f"from {tool}" in example:
                warnings.simplefilter("ignore")  # what others deprecate
                pytest.importorskip(tool)
        exec(compile(example, "README.md", "exec", dont_inherit=True), {"__name__": "example"})


MERGES = re.findall(r"^metagpt-fast merge .*$", text_of(README), re.MULTILINE)


@pytest.mark.parametrize("line", MERGES)
def test_merge_examples_run(line, tmp_path, monkeypatch):
    make_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line, comments=True)[1:]
    assert cli.main([*arguments, "--quiet"], prog_name="metagpt-fast", standalone_mode=False) in {None, 0}
    is_dry = "--dry-run" in arguments
    assert (tmp_path / arguments[arguments.index("-o") + 1] / "config.json").exists() != is_dry


RECIPES = [
    pytest.param(body, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (language, body) in enumerate(FENCE.findall(text_of(page)))
    if language == "yaml"
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run(recipe, tmp_path, monkeypatch):
    shape = replace(PRESETS["tiny"].shape, hidden_size=16, intermediate_size=16, num_layers=24, vocab_size=32)
    make_family(tmp_path, shape=shape, max_shard_nbytes=1 << 20, seed=0)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    cli.main(["run", "recipe.yaml", "merged", "--quiet"], prog_name="metagpt-fast", standalone_mode=False)
    assert (tmp_path / "merged" / "config.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
