"""A merge that is interrupted and resumed: the same bytes, nothing measured twice, and nothing mixed up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import ml_dtypes  # noqa: F401 - registers bfloat16
import numpy as np
import pytest

import metagpt_fast as mf
from metagpt_fast import merging, recorder
from metagpt_fast.dtypes import BF16, F16, F32
from metagpt_fast.errors import DataError, OutputError
from metagpt_fast.layer_pass import LayerPass

from .checkpoints import digests, integers, random_states, tensor, write_family

SHAPES = {
    "model.embed_tokens.weight": (97, 24),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in (0, 1, 2)
        for name, shape in {"up.weight": (64, 40), "q.weight": (24, 25), "norm.weight": (24,)}.items()
    },
    "model.empty": (0, 24),
    "model.same.weight": (30, 30),
    "lm_head.weight": (97, 24),
}
# Two passes; one pass; no measuring; a row's own coefficients; a column's; thresholds; row divergences; random masks.
MERGES = {
    "metagpt": {},
    "metagpt by layer": {"granularity": "layer"},
    "metagpt by tensor": {"granularity": "tensor"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "model_stock": {"method": "model_stock"},
    "slerp": {"method": "slerp", "parameters": {"t": 0.3}},
    "nuslerp by row": {"method": "nuslerp", "parameters": {"nuslerp_row_wise": True}},
    "nuslerp by column": {"method": "nuslerp", "parameters": {"nuslerp_row_wise": False}},
    "ties": {"method": "ties", "parameters": {"density": 0.4}},
    "ties with metagpt": {"method": "ties", "parameters": {"density": 0.4}, "coefficients": "metagpt"},
    "dare_ties": {"method": "dare_ties", "parameters": {"density": 0.5, "seed": 3}},
    "della": {"method": "della", "parameters": {"density": 0.5}},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"density": 0.6}},
    "sce": {"method": "sce", "parameters": {"select_topk": 0.5}},
    "arcee_fusion": {"method": "arcee_fusion"},
    "f16 with overflow": {"dtype": "f16"},
}
ONE_MODEL = {"slerp", "arcee_fusion"}
TWO_MODELS = {"nuslerp by row", "nuslerp by column"}
IN_TWO_PASSES = {"metagpt", "ties with metagpt", "f16 with overflow"}


@pytest.fixture
def family(tmp_path):
    states = random_states(11, [(BF16, F32), (BF16,), (F32, F16), (BF16,)], SHAPES)
    for state in states:
        state["position_ids"] = integers([1, 2, 3])
        state["model.same.weight"] = tensor(np.full((30, 30), 0.25), BF16)
        state["model.layers.1.huge"] = tensor(np.full(5, 60000.0), F32)
    for state in states[1:]:
        state["model.layers.1.huge"] = tensor(np.linspace(65000.0, 66000.0, 5), F32)
    return write_family(tmp_path / "in", states, num_shards=2)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many batches, and each recorded as soon as it is done."""
    monkeypatch.setattr(merging, "_MAX_WINDOW_NBYTES", 1 << 14)
    monkeypatch.setattr(recorder, "RECORD_SECONDS", 0.0)


def merge(family, out, name, **more):
    base, models = family
    count = 1 if name in ONE_MODEL else 2 if name in TWO_MODELS else 3
    arguments = {"max_shard_size": 12_000, "exclude": "lm_head", **MERGES[name], **more}
    return mf.merge(base, models[:count], out, **arguments)


def files_of(out):
    """What the output holds, with those numbers of the record that two runs share."""
    content = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    record = json.loads(content.pop("metagpt_fast.json"))
    volatile = {"out", "seconds", "seconds_measure", "seconds_combine", "nbytes_read", "nbytes_written", "num_resumed"}
    content["README.md"] = re.sub(rb"\b(expected|out\d*)\b", b"OUT", content["README.md"])
    return content, {key: value for key, value in record.items() if key not in volatile}


class Interrupter:
    """Ctrl-C before the n-th call of a method of LayerPass; counts the calls."""

    def __init__(self, monkeypatch, method, at=10**9):
        self.num_calls = 0
        original = getattr(LayerPass, method)

        def interrupted(layers, *arguments):
            self.num_calls += 1
            if self.num_calls == at:
                raise KeyboardInterrupt
            return original(layers, *arguments)

        monkeypatch.setattr(LayerPass, method, interrupted)


@pytest.mark.parametrize("name", MERGES)
def test_a_resumed_merge_has_the_same_bytes(family, tmp_path, monkeypatch, name):
    expected_report = merge(family, tmp_path / "expected", name)
    with monkeypatch.context() as patch:
        combining = Interrupter(patch, "_combine")
        merge(family, tmp_path / "counted", name)
    resumed = 0
    for at in sorted({2, combining.num_calls // 2, combining.num_calls} - {0, 1}):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patch:
            Interrupter(patch, "_combine", at)
            with pytest.raises(KeyboardInterrupt, match="--resume"):
                merge(family, out, name)
        assert not out.exists()
        with monkeypatch.context() as patch:
            measuring, again = Interrupter(patch, "_measure"), Interrupter(patch, "_combine")
            # Other batches, threads and ways to read: none of them changes a byte.
            report = merge(family, out, name, resume=True, threads=1 + at % 3, io="pread" if at % 2 else "mmap")
        assert files_of(out)[0] == files_of(tmp_path / "expected")[0]
        ours, theirs = files_of(out)[1], files_of(tmp_path / "expected")[1]
        assert {**ours, "num_threads": 0, "io": ""} == {**theirs, "num_threads": 0, "io": ""}
        assert report.warnings == expected_report.warnings
        assert np.array_equal(report.coefficients, expected_report.coefficients)
        assert again.num_calls <= combining.num_calls - at + 2  # the tensor without elements is done again
        assert report.num_resumed >= at - 1  # every batch before the interrupt had at least one tensor
        if name in IN_TWO_PASSES:
            assert measuring.num_calls == (name == "ties with metagpt")  # of the tensor without elements, again
        resumed += 1
    assert resumed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_interrupted_while_it_opens_what_is_there(family, tmp_path, monkeypatch):
    """What an earlier run has done is kept, and the message says so."""
    merge(family, tmp_path / "expected", "metagpt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupter(patch, "_combine", 4)
        merge(family, tmp_path / "out", "metagpt")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        patch.setattr("metagpt_fast.shard_files.ShardFiles.open", interrupt)
        merge(family, tmp_path / "out", "metagpt", resume=True)
    report = merge(family, tmp_path / "out", "metagpt", resume=True)
    assert report.num_resumed > 0
    assert files_of(tmp_path / "out")[0] == files_of(tmp_path / "expected")[0]


@pytest.mark.parametrize("name", sorted(IN_TWO_PASSES))
def test_a_measuring_pass_goes_on_where_it_stopped(family, tmp_path, monkeypatch, name):
    merge(family, tmp_path / "expected", name)
    with monkeypatch.context() as patch:
        measuring = Interrupter(patch, "_measure")
        merge(family, tmp_path / "counted", name)
    at = measuring.num_calls // 2
    with monkeypatch.context() as patch:
        Interrupter(patch, "_measure", at)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            merge(family, tmp_path / "out", name)
    with monkeypatch.context() as patch:
        again = Interrupter(patch, "_measure")
        merge(family, tmp_path / "out", name, resume=True)
    assert again.num_calls <= measuring.num_calls - at + 2  # a tensor in several batches is measured again
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_many_interruptions(family, tmp_path, monkeypatch):
    merge(family, tmp_path / "expected", "metagpt")
    count = 0
    while True:
        count += 1
        with monkeypatch.context() as patch:
            Interrupter(patch, "_measure", 3)
            Interrupter(patch, "_combine", 3)
            try:
                merge(family, tmp_path / "out", "metagpt", resume=True)
            except KeyboardInterrupt:
                continue
        break
    assert count > 5
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def interrupted(family, out, monkeypatch, name="metagpt", **more):
    with monkeypatch.context() as patch:
        Interrupter(patch, "_combine", 4)
        with pytest.raises(KeyboardInterrupt):
            merge(family, out, name, **more)
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("metagpt by layer", {}, "granularity was 'model', now 'layer'"),
        ("metagpt", {"exponent": 1.0}, "parameter: exponent was 2.0, now 1.0"),
        ("task_arithmetic", {}, "method was 'metagpt', now 'task_arithmetic'"),
        ("metagpt", {"dtype": "f32"}, "dtype was 'keep', now 'F32'"),
        ("metagpt", {"exclude": "norm"}, "exclude was 'lm_head', now 'norm'"),
        ("metagpt", {"max_shard_size": 10_000}, "output file: model-00001-of-"),
        ("metagpt", {"backend": "reference"}, "backend was 'cpu', now 'reference'"),
    ],
)
def test_another_merge_is_not_resumed(family, tmp_path, monkeypatch, name, change, told):
    build = interrupted(family, tmp_path / "out", monkeypatch)
    before = digests(build / "files"), (build / "journal").read_bytes()
    with pytest.raises(OutputError, match="was another one") as caught:
        merge(family, tmp_path / "out", name, resume=True, **change)
    assert told in caught.value.got
    assert "rm -r" in caught.value.hint
    assert (digests(build / "files"), (build / "journal").read_bytes()) == before
    merge(family, tmp_path / "out", "metagpt", resume=True)


def test_changed_inputs_are_not_resumed(family, tmp_path, monkeypatch):
    interrupted(family, tmp_path / "out", monkeypatch)
    file = sorted(family[1][1].glob("*.safetensors"))[0]
    os.utime(file, ns=(1, 86_400_000_000_001))
    was, now = r"last change was '20.*\.\d{9} UTC'", "now '1970-01-02 00:00:00.000000001 UTC'"
    with pytest.raises(OutputError, match=rf"input: m1: file {re.escape(file.name)}: {was}, {now}"):
        merge(family, tmp_path / "out", "metagpt", resume=True)


def test_other_versions_are_not_resumed(family, tmp_path, monkeypatch):
    interrupted(family, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("metagpt_fast.jobs.__version__", "99.0")
    with pytest.raises(OutputError, match=r"metagpt_fast version was '.*', now '99.0'"):
        merge(family, tmp_path / "out", "metagpt", resume=True)


def test_inputs_may_move(family, tmp_path, monkeypatch):
    merge(family, tmp_path / "expected", "metagpt")
    interrupted(family, tmp_path / "out", monkeypatch)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "base", [tmp_path / "elsewhere" / path.name for path in family[1]]
    merge(moved, tmp_path / "out", "metagpt", resume=True)
    ours, theirs = files_of(tmp_path / "out")[0], files_of(tmp_path / "expected")[0]
    assert ours == theirs


def test_without_resume_nothing_is_thrown_away(family, tmp_path, monkeypatch):
    build = interrupted(family, tmp_path / "out", monkeypatch)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"interrupted merge to this output is there.*--resume"):
            merge(family, tmp_path / "out", "metagpt", overwrite=overwrite)
    assert build.exists()


def test_resume_begins_where_there_is_nothing(family, tmp_path):
    report = merge(family, tmp_path / "out", "metagpt", resume=True)
    assert report.num_resumed == 0
    with pytest.raises(OutputError, match="--overwrite"):
        merge(family, tmp_path / "out", "metagpt", resume=True)


def test_an_interrupt_before_anything_is_done_leaves_nothing(family, tmp_path, monkeypatch):
    Interrupter(monkeypatch, "_measure", 1)
    with pytest.raises(KeyboardInterrupt) as caught:
        merge(family, tmp_path / "out", "metagpt", exclude=None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left in ({"in"}, {"in", ".out.partial"})  # the copied integer tensor may have been recorded
    assert bool(caught.value.args) == (".out.partial" in left)


def test_what_cannot_succeed_later_is_not_kept(family, tmp_path, monkeypatch):
    def refuse(layers, batch, writer):
        raise DataError("NaN", where="a tensor")

    monkeypatch.setattr(LayerPass, "_combine", refuse)
    with pytest.raises(DataError) as caught:
        merge(family, tmp_path / "out", "metagpt")
    assert caught.value.hint is None
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_measurement_file_is_part_of_the_job(family, tmp_path, monkeypatch):
    measured = mf.measure(family[0], family[1], exclude="lm_head")
    measured.save(tmp_path / "m.json")
    merge(family, tmp_path / "expected", "metagpt", measurement=tmp_path / "m.json")
    interrupted(family, tmp_path / "out", monkeypatch, measurement=tmp_path / "m.json")
    with pytest.raises(OutputError, match="measurement file was"):
        merge(family, tmp_path / "out", "metagpt", resume=True)
    merge(family, tmp_path / "out", "metagpt", measurement=tmp_path / "m.json", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_a_measurement_is_saved_by_the_run_that_resumes(family, tmp_path, monkeypatch):
    merge(family, tmp_path / "expected", "metagpt", measurement=tmp_path / "expected.json")
    interrupted(family, tmp_path / "out", monkeypatch, measurement=tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()
    merge(family, tmp_path / "out", "metagpt", measurement=tmp_path / "m.json", resume=True)
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_a_recipe_is_resumed(family, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    models = "".join(f"  - model: {path}\n    parameters: {{weight: 0.{t + 2}}}\n" for t, path in enumerate(family[1]))
    text = (
        f"merge_method: ties\nbase_model: {family[0]}\nmodels:\n{models}parameters: {{density: 0.5}}\ndtype: float32\n"
    )
    recipe.write_text(text)
    mf.run(recipe, tmp_path / "expected", max_shard_size=12_000)
    with monkeypatch.context() as patch:
        Interrupter(patch, "_combine", 4)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            mf.run(recipe, tmp_path / "out", max_shard_size=12_000)
    recipe.write_text(text.replace("density: 0.5", "density: 0.6"))
    with pytest.raises(OutputError, match="recipe: not the same"):
        mf.run(recipe, tmp_path / "out", max_shard_size=12_000, resume=True)
    recipe.write_text(text)
    report = mf.run(recipe, tmp_path / "out", max_shard_size=12_000, resume=True)
    assert report.num_resumed > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize(
    "signum, status, word",
    [
        (signal.SIGINT, 130, "interrupted: "),
        (signal.SIGTERM, 143, "stopped by SIGTERM: "),
        (signal.SIGHUP, 129, "stopped by SIGHUP: "),
    ],
)
def test_signals_say_how_to_resume(family, tmp_path, signum, status, word):
    merge(family, tmp_path / "expected", "metagpt")
    code = f"""
import os, sys
from metagpt_fast import merging, recorder
from metagpt_fast.cli import main
from metagpt_fast.layer_pass import LayerPass
merging._MAX_WINDOW_NBYTES, recorder.RECORD_SECONDS = 1 << 14, 0.0
combine, left = LayerPass._combine, [4]
def interrupted(*arguments):
    left[0] -= 1
    if left[0] == 0 and "--resume" not in sys.argv:
        os.kill(os.getpid(), {int(signum)})
    combine(*arguments)
LayerPass._combine = interrupted
main()
"""
    base, models = family
    command = [sys.executable, "-c", code, "merge", base, *models, "-o", "out", "-q"]
    command += ["--max-shard-size", "12kB", "--exclude", "lm_head"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert first.returncode == status
    build = tmp_path / ".out.partial"
    assert first.stderr.startswith(word + f"what is done is kept in {build}: the same command with --resume")
    assert first.stderr.count("\n") == 1
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert second.returncode == 1
    assert "--resume" in second.stderr
    subprocess.run([*command, "--resume"], check=True, capture_output=True, cwd=tmp_path)
    ours, theirs = files_of(tmp_path / "out")[0], files_of(tmp_path / "expected")[0]
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"README.md"}  # it quotes the paths as typed


def test_a_full_disk_while_merging_wastes_nothing(family, tmp_path, monkeypatch):
    """The file system gives no reservation, and fills up."""
    merge(family, tmp_path / "expected", "metagpt")
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, nbytes: (_ for _ in ()).throw(OSError(95, "no")))
    fsync, left = os.fsync, [12]

    def full(fd):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*free some space.*--resume"):
            merge(family, tmp_path / "out", "metagpt")
    report = merge(family, tmp_path / "out", "metagpt", resume=True)
    assert report.num_resumed > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
