"""The model card: right numbers, valid front matter, and no name or path that does harm on a web page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from metagpt_fast.artifacts import report_json
from metagpt_fast.cli import cli
from metagpt_fast.model_card import equation, model_card, model_id
from metagpt_fast.report import MergeReport

HOSTILE = [
    "a|b\n# x",
    "](javascript:alert(1))",
    "[click](http://evil.example)",
    "---",
    "`code` ``` ```` ~~~",
    "<script>alert(1)</script>",
    "https://evil.example www.evil.example me@evil.example",
    "![x](y) **bold** _it_ $$1$$",
    "back\\slash\\|pipe\\`tick",
    '"quoted": [yaml, {x: y}] #',
    "- item",
    "\u202egnp.exe\u2028\x00\x1b[31m\ud800",
    "größe 😀",
    " ",
    "",
]


def make_report(**changes):
    facts = {
        "out": Path("/home/alice/models/merged"),
        "base": "/home/alice/models/llama",
        "models": ("/home/alice/models/chat", "/home/alice/models/math"),
        "labels": ("chat", "math"),
        "method": "metagpt",
        "parameters": {"exponent": 2.0},
        "granularity": "model",
        "exclude": None,
        "out_dtype": "keep",
        "scopes": ("model",),
        "coefficients": np.array([[0.25, 0.75]]),
        "norms": np.array([1.5, 3.0]),
        "cosines": np.array([[1.0, 0.125], [0.125, 1.0]]),
        "base_norm": 100.0,
        "warnings": (),
        "num_tensors": 10,
        "num_copied": 1,
        "num_parameters": 1_100_000_000,
        "nbytes_read": 1,
        "nbytes_written": 1,
        "seconds": 1.0,
        "seconds_measure": 0.5,
        "seconds_combine": 0.5,
        "backend": "cpu",
        "isa": "avx2",
        "num_threads": 2,
        "io": "mmap",
        "measurement_reused": False,
        "fingerprints": {},
        "versions": {"metagpt_fast": "0.1.0"},
        "shards": ("model.safetensors",),
    }
    return MergeReport(**(facts | changes))


def front_matter(card):
    match = re.match(r"---\n(.*?\n)---\n\n", card, re.DOTALL)
    return yaml.safe_load(match[1])


def render(card):
    """Tokens of the Markdown below the front matter."""
    return MarkdownIt("commonmark").enable("table").parse(card.split("\n---\n", 1)[1])


def tables(card):
    """Cells of each table, row by row."""
    found = []
    tokens = render(card)
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in tokens[index + 1].children))
    return found


def fences(card):
    return {token.info: token.content for token in render(card) if token.type == "fence"}


def test_front_matter():
    assert front_matter(model_card(make_report())) == {
        "base_model": ["llama", "chat", "math"],
        "library_name": "transformers",
        "tags": ["merge", "metagpt_fast"],
    }


def test_tables():
    assert tables(model_card(make_report())) == [
        [
            ["model", "λ", "‖τ‖", "‖τ‖ / ‖θ₀‖"],
            ["chat", "0.25", "1.5", "0.015"],
            ["math", "0.75", "3", "0.03"],
        ],
        [["model", "chat", "math"], ["chat", "1", "0.125"], ["math", "0.125", "1"]],
    ]


def test_nothing_measured():
    card = model_card(make_report(norms=None, cosines=None, base_norm=None, method="task_arithmetic"))
    assert tables(card) == [[["model", "λ"], ["chat", "0.25"], ["math", "0.75"]]]
    assert "Cosines" not in card


def test_one_model_has_no_cosines():
    changes = {"models": ("a",), "labels": ("a",), "coefficients": np.ones((1, 1)), "norms": np.ones(1)}
    card = model_card(make_report(cosines=np.ones((1, 1)), **changes))
    assert len(tables(card)) == 1
    assert "1 fine-tuned model of" in card


def test_a_summary_stands_for_many_scopes():
    coefficients = np.array([[0.0, 1.0], [0.5, 0.5], [0.25, 0.75]])
    card = model_card(make_report(granularity="layer", scopes=("a", "b", "c"), coefficients=coefficients))
    assert tables(card)[0] == [
        ["model", "λ min", "λ mean", "λ max", "‖τ‖", "‖τ‖ / ‖θ₀‖"],
        ["chat", "0", "0.25", "0.5", "1.5", "0.015"],
        ["math", "0.5", "0.75", "1", "3", "0.03"],
    ]
    assert "Over 3 scopes; the coefficients of each are in `metagpt_fast.json`." in card


def test_one_scope_of_granularity_layer_is_shown_as_it_is():
    assert tables(model_card(make_report(granularity="layer", scopes=("lm_head",))))[0][0][1] == "λ"


@pytest.mark.parametrize(
    "method, parameters, expected",
    [
        ("metagpt", {"exponent": 2.0}, "λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖²"),
        ("metagpt", {}, "λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖²"),
        ("metagpt", {"exponent": -1.0}, "p = -1.0"),
        ("task_arithmetic", {"coefficients": [0.3, 0.3]}, "λ_t as given"),
        ("linear", {"coefficients": [1, 2]}, "w_t / Σ_k w_k"),
        ("another", {}, "τ_t = θ_t − θ₀"),
    ],
)
def test_equation(method, parameters, expected):
    report = make_report(method=method, parameters=parameters)
    assert equation(report).endswith(expected)
    assert "\n" not in equation(report)
    assert f"`{equation(report)}`" in model_card(report)


@pytest.mark.parametrize(
    "path, expected",
    [
        (
            "/home/a/.cache/huggingface/hub/models--meta-llama--Llama-2-7b/snapshots/0123abc",
            "meta-llama/Llama-2-7b",
        ),
        ("/hub/models--gpt2/snapshots/0123abc/", "gpt2"),
        ("/hub/models--org--sdxl/snapshots/0123abc/unet/model.safetensors", "org/sdxl"),
        ("/home/a/models/chat/", "chat"),
        ("chat", "chat"),
        ("/data/models--x--y", "models--x--y"),
        (".", Path.cwd().name),
    ],
)
def test_model_id(path, expected):
    assert model_id(path) == expected


def test_the_command_reproduces_the_merge():
    report = make_report(
        models=("/hub/models--org--chat/snapshots/1", "/home/alice/my $(rm -rf) models/-math's"),
        parameters={"exponent": -1.5, "coefficients": [-0.5, 2], "seed": 3, "names": ("a b", "c")},
        exclude="^lm_head|'x'",
        out_dtype="BF16",
        granularity="layer",
    )
    assert shlex.split(fences(model_card(report))["sh"]) == [
        *("metagpt-fast", "merge", "llama", "org/chat", "./-math's", "-o", "merged"),
        *("--set", "seed=3", "--set", "names=a b,c", "--method", "metagpt", "--granularity", "layer"),
        *("--exponent=-1.5", "--coefficients=-0.5,2", "--exclude", "^lm_head|'x'", "--dtype", "BF16"),
    ]


def test_same_ids_are_told_apart_by_labels():
    models = ("/hub/models--org--m/snapshots/1", "/hub/models--org--m/snapshots/2")
    card = model_card(make_report(models=models, labels=("1", "2")))
    assert [row[0] for row in tables(card)[0]] == ["model", "1", "2"]


def test_local_paths_are_not_published():
    warnings = (
        "/home/alice/models/llama/config.json: something",
        "/home/alice/models/chat takes 97 % of the weight; /home/alice/models/merged may equal it",
    )
    report = make_report(warnings=warnings)
    card = model_card(report)
    assert "alice" not in card
    assert "/home" not in card
    assert fences(card)["text"].splitlines() == [
        "llama/config.json: something",
        "chat takes 97 % of the weight; merged may equal it",
    ]
    assert "/home/alice/models/llama" in report_json(report, {})  # the record keeps them


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_no_harm(name):
    report = make_report(
        out=Path("/out") / name,
        base=f"/models/{name}",
        models=(f"/a/{name}", "/models/math"),
        labels=(name, "math"),
        exclude=name,
        method=name,
        warnings=(f"{name} is odd", "```", "# not a heading", "````", "a\nb"),
        parameters={"coefficients": name, name: name},
        out_dtype=name,
    )
    card = model_card(report)
    card.encode()
    front_matter(card)
    kinds = {token.type for token in render(card)}
    inline = {child.type for token in render(card) for child in token.children or ()}
    assert inline <= {"text", "code_inline", "softbreak"}
    assert not kinds & {"html_block", "blockquote_open", "hr", "code_block", "ordered_list_open"}
    assert sum(token.type == "heading_open" for token in render(card)) == 5
    assert sum(token.type == "bullet_list_open" for token in render(card)) == 1
    assert set(fences(card)) == {"text", "sh"}
    assert [[len(row) for row in table] for table in tables(card)] == [[4, 4, 4], [3, 3, 3]]

    # Nothing from a name is outside of code: plain text is what a harmless report has, too.
    def plain(text):
        return [
            child.content
            for token in render(text)
            for child in token.children or ()
            if child.type == "text" and not re.fullmatch(r"[\d.]+", child.content)
        ]

    harmless = make_report(warnings=("x",), exclude="x")
    assert plain(card) == plain(model_card(harmless))


def test_only_ids_of_the_hubs_form_are_base_models():
    hostile = make_report(base="/m/my model", models=("/m/a'b", "/m/[x]"))
    assert "base_model" not in front_matter(model_card(hostile))
    mixed = make_report(base="/m/123", models=("/m/no", "/m/my model"))
    assert front_matter(model_card(mixed))["base_model"] == ["123", "no"]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_flag_is_spelled_as_the_command_reads_it(normalize):
    method = "task_arithmetic" if normalize else "linear"  # each where it is not the default, which is left out
    report = make_report(method=method, parameters={"weight": (0.5, 0.7), "normalize": normalize})
    arguments = shlex.split(fences(model_card(report))["sh"])[2:]
    context = cli.commands["merge"].make_context("merge", arguments)
    assert context.params["parameters"] == {"normalize": normalize}


def test_the_equation_of_weights_that_are_not_normalized_has_no_base():
    parameters = {"weight": (0.5, 0.7), "normalize": False}
    assert equation(make_report(method="linear", parameters=parameters)) == "θ = Σ_t w_t θ_t,  w_t as given"
