"""Bad input through the command line: one message, status 1, inputs untouched, and nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from metagpt_fast.cli import cli
from metagpt_fast.dtypes import BF16, DTYPES, F16, F32, F64
from metagpt_fast.layer_pass import LayerPass

from .checkpoints import State, Tensor, digests, integers, random_states, read_state  # isort: skip
from .checkpoints import shard_bytes, tensor, write_family, write_state  # isort: skip
from .hostile import ZEROS, A, entry, file_bytes, write_shards

SHAPES = {"model.embed_tokens.weight": (12, 4), "model.layers.0.w": (30,), "lm_head.weight": (12, 4)}


def states() -> list[State]:
    made = random_states(71, [(BF16,)] * 3, SHAPES)
    for state in made:
        state["position_ids"] = integers([0, 1, 2])
    return made


@dataclass
class Family:
    """Sound checkpoints to break: ``folder/base``, ``folder/m0`` and ``folder/m1``."""

    folder: Path

    def __post_init__(self) -> None:
        self.base, (self.chat, self.math) = write_family(self.folder, states(), num_shards=2)
        self.arguments = [str(self.base), str(self.chat), str(self.math)]
        self.options: list[str] = []

    def shard(self, number: int) -> Path:
        """A file of the first model."""
        return self.chat / f"model-0000{number}-of-00002.safetensors"

    def rewrite(self, which: int, change: Callable[[State], object]) -> None:
        """Write a checkpoint (0 is the base) again after a change of its tensors."""
        state = states()[which]
        change(state)
        path = [self.base, self.chat, self.math][which]
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        write_state(path, state)

    def replace_file(self, content: bytes) -> None:
        """Make the first model a folder with just this file."""
        self.rewrite(1, lambda state: None)
        (self.chat / "model.safetensors").write_bytes(content)


def missing_folder(f):
    f.arguments[1] = str(f.folder / "absent")


def missing_file(f):
    f.arguments[0] = str(f.folder / "absent.safetensors")


def no_safetensors(f):
    for path in f.chat.glob("*.safetensors*"):
        path.unlink()


def pickles_only(f):
    no_safetensors(f)
    (f.chat / "training_args.bin").write_bytes(b"\x80\x02")


def a_pickle_of_old(f):
    no_safetensors(f)
    (f.chat / "pytorch_model.bin").write_bytes(b"\x80\x02")


def a_shard_is_not_there(f):
    f.shard(2).unlink()


def a_shard_outside_the_folder(f):
    path = f.chat / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.w"] = "../base/model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def truncated_shard(f):
    f.shard(1).write_bytes(f.shard(1).read_bytes()[:-3])


def broken(content: bytes) -> Callable[[Family], None]:
    return lambda f: f.replace_file(content)


def tensor_missing(f):
    f.rewrite(1, lambda state: state.pop("model.layers.0.w"))


def tensor_extra(f):
    f.rewrite(2, lambda state: state.update({"model.layers.1.w": tensor([1.0])}))


def shape_mismatch(f):
    f.rewrite(2, lambda state: state.update({"model.layers.0.w": tensor(np.zeros((5, 6)))}))


def other_vocabulary(f):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    f.rewrite(1, lambda state: state.update({name: tensor(np.ones((14, 4))) for name in names}))


def fp8_weights(f):
    raw = np.zeros(30, np.uint8)
    f.rewrite(1, lambda state: state.update({"model.layers.0.w": Tensor(DTYPES["F8_E4M3"], (30,), raw)}))


def integers_differ(f):
    f.rewrite(2, lambda state: state.update({"position_ids": integers([0, 1, 3])}))


def quantized_weights(f):
    raw = np.zeros(30, np.uint8)
    f.rewrite(1, lambda state: state.update({"model.layers.0.w": Tensor(DTYPES["U8"], (30,), raw)}))


def nonfinite(which, value, dtype=BF16, options=()):
    def change(state):
        values = np.zeros(30)
        values[[11, 17]] = value
        state["model.layers.0.w"] = tensor(values, dtype)

    def break_family(f):
        f.rewrite(which, change)
        f.options += options

    return break_family


def copies_of_the_base(f):
    for which in (1, 2):
        f.rewrite(which, lambda state: (state.clear(), state.update(states()[0])))


def base_as_a_model(f):
    f.arguments[2] = f.arguments[0] + "/"


def output_exists(f):
    write_state(f.folder / "out", states()[0])


def output_is_an_input(f):
    f.options += ["-o", str(f.math), "--overwrite"]


def output_inside_an_input(f):
    f.options += ["-o", str(f.base / "merged")]


def output_contains_an_input(f):
    f.options += ["-o", str(f.folder), "--overwrite"]


def no_folder_for_the_output(f):
    f.options += ["-o", str(f.folder / "absent" / "out")]


def bad_regex(f):
    f.options += ["--exclude", "lm_head("]


def everything_excluded(f):
    f.options += ["--exclude", "."]


def too_many_coefficients(f):
    f.options += ["--method", "task_arithmetic", "--coefficients", "1,2,3"]


def unknown_method(f):
    f.options += ["--method", "tiles"]


def unknown_parameter(f):
    f.options += ["--set", "density=0.5"]


def endless_exponent(f):
    f.options += ["--set", "exponent=1" + "0" * 400]


def little_memory(f):
    f.options += ["--memory", "1MiB"]


# What breaks → what the message says.
CASES: dict[Callable[[Family], None], tuple[str, ...]] = {
    missing_folder: ("absent", "does not exist"),
    missing_file: ("absent.safetensors", "does not exist"),
    no_safetensors: ("m0", "no safetensors", "got config.json", "expected model.safetensors"),
    pickles_only: ("m0", "pickle", "got training_args.bin", "convert it"),
    a_pickle_of_old: ("m0", "pytorch_model.bin", "since PyTorch 1.6", "convert it"),
    a_shard_is_not_there: ("m0", "shards that are not there", "model-00002-of-00002", "complete the download"),
    a_shard_outside_the_folder: ("outside the folder", "../base/", "do not trust"),
    truncated_shard: ("model-00001-of-00002", "truncated", "got a file of", "download it again"),
    tensor_missing: ("'model.layers.0.w' is missing from m0", "got 3 tensors", "of the 4", "--exclude"),
    tensor_extra: ("m1 has tensors that the base has not", "got 'model.layers.1.w'", "--exclude"),
    shape_mismatch: ("'model.layers.0.w' in m1", "got [5, 6]", "expected [30]", "--exclude"),
    other_vocabulary: ("the vocabularies differ", "got [14, 4]", "expected [12, 4]", "--exclude"),
    fp8_weights: ("'model.layers.0.w'", "got F8_E4M3", "expected F32, F16, BF16 or F64", "converted to bf16"),
    quantized_weights: ("'model.layers.0.w' in m0", "got U8", "expected BF16", "--exclude"),
    integers_differ: ("'position_ids' of m1 differs", "got other values", "expected the same I64", "--exclude"),
    copies_of_the_base: ("every model equals the base", "got ‖θ_t − θ₀‖ = 0 for m0, m1", "expected at least one"),
    base_as_a_model: ("the base is also given as one of the models", "which is the base", "name the base first"),
    output_exists: ("out", "exists", "--overwrite"),
    output_is_an_input: ("is one of the inputs", "got", "expected a place outside", "-o"),
    output_inside_an_input: ("lies inside an input", "got", "expected a place outside", "-o"),
    output_contains_an_input: ("contains an input", "got", "expected a place outside", "-o"),
    no_folder_for_the_output: ("absent", "does not exist", "mkdir -p"),
    bad_regex: ("exclude: not a regular expression", "got 'lm_head('", "Python's syntax"),
    everything_excluded: ("nothing to merge", "got 4 tensors", "expected at least one"),
    too_many_coefficients: ("task_arithmetic.weight", "got 3", "expected 1", "or 2"),
    unknown_method: ("unknown method", "got 'tiles'", "linear, metagpt, ", "ties"),
    unknown_parameter: ("metagpt has no parameter 'density'", "expected exponent"),
    endless_exponent: ("metagpt.exponent", "expected a finite number"),
    little_memory: ("memory", "got 1048576 bytes", "expected at least 64MiB"),
}
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "long header": (file_bytes({"a": A}, header_nbytes=5000), ("header is longer than the file", "expected at least")),
    "not JSON": (file_bytes('{"a": '), ("header is not valid JSON", "expected one UTF-8 JSON object")),
    "hole": (file_bytes({"a": entry("F32", [1], 4, 8)}, ZEROS), ("a hole", "'a'", "got data_offsets begin 4")),
    "overlap": (
        file_bytes({"a": A, "b": entry("F32", [1], 2, 6)}, ZEROS[:6]),
        ("overlap", "'b'", "got data_offsets begin 2", "expected 4"),
    ),
    "twice": (file_bytes(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}', ZEROS[:4]), ("'a' twice", "got")),
    "overflow": (file_bytes({"a": entry("F32", [2**62, 2**62], 0, 4)}, ZEROS[:4]), ("overflows", "'a'", "got")),
    "shape and bytes": (
        file_bytes({"a": entry("F32", [2], 0, 4)}, ZEROS[:4]),
        ("disagree", "'a'", "got 4 bytes", "expected 8 bytes"),
    ),
    "unknown dtype": (file_bytes({"a": entry("Q4", [8], 0, 4)}, ZEROS[:4]), ("unknown dtype", "'a'", "got 'Q4'")),
    "no header": (b"abc", ("too small", "got 3 bytes")),
}
CASES_OF_FILES = {broken(content): ("model.safetensors", *says) for content, says in FILES.values()}
FINITE = ("'model.layers.0.w'", "holds NaN or Inf", "got 2 such elements, the first at index 11", "--exclude")
NONFINITE = {
    f"{which}-{value}-{dtype}-{' '.join(options)}": (nonfinite(which, value, dtype, options), owner)
    for which, owner in ((0, "the base"), (1, "m0"), (2, "m1"))
    for value, dtype, options in (
        (np.nan, BF16, ()),
        (np.inf, F32, ("--granularity", "layer")),
        (-np.inf, F16, ("--granularity", "tensor")),
        (np.nan, F64, ("--method", "task_arithmetic")),
        (np.inf, BF16, ("--io", "pread")),
        (np.inf, BF16, ("--method", "linear")),
    )
    if owner != "the base" or "linear" not in options
}


def refuse(family: Family, *says: str) -> None:
    """Run the merge; check that it ends as every refused merge has to."""
    before = digests(family.folder)
    folders = sorted(path for path in family.folder.rglob("*") if path.is_dir())
    out = [] if "-o" in family.options else ["-o", str(family.folder / "out")]
    result = CliRunner().invoke(cli, ["merge", *family.arguments, *out, *family.options, "--quiet", "--json"])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    for part in says:
        assert part in result.stderr
    details = json.loads(result.stdout)
    assert details["message"] in result.stderr
    assert details["where"]
    assert details["hint"] or details["expected"]
    assert digests(family.folder) == before
    assert sorted(path for path in family.folder.rglob("*") if path.is_dir()) == folders


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path / "family")


@pytest.mark.parametrize(("break_family", "says"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_refused(family, break_family, says):
    break_family(family)
    refuse(family, *says)


@pytest.mark.parametrize(("break_family", "says"), CASES_OF_FILES.items(), ids=FILES)
def test_broken_files(family, break_family, says):
    break_family(family)
    refuse(family, *says)


@pytest.mark.parametrize(("break_family", "owner"), NONFINITE.values(), ids=NONFINITE)
def test_nonfinite_weights(family, break_family, owner):
    break_family(family)
    refuse(family, *FINITE, f"of {owner} holds")


def test_nonfinite_weights_are_found_with_a_saved_measurement(family):
    """The measurement was made before the file was damaged in a place that its fingerprint does not sample."""
    shapes = {"model.layers.0.w": (100_000,)}
    base, (model,) = write_family(family.folder / "large", random_states(72, [(BF16,)] * 2, shapes))
    file, saved = model / "model.safetensors", family.folder / "m.json"
    assert CliRunner().invoke(cli, ["measure", str(base), str(model), "-o", str(saved)]).exit_code == 0
    stats, content = file.stat(), bytearray(file.read_bytes())
    first = len(content) - 200_000 + 2 * 3000
    content[first : first + 2] = b"\xc0\x7f"
    file.write_bytes(content)
    os.utime(file, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    family.arguments = [str(base), str(model)]
    family.options = ["--measurement", str(saved)]
    refuse(family, "of m0 holds NaN", "got 1 such elements, the first at index 3000")


def test_nan_in_a_later_piece_of_a_large_tensor(family, monkeypatch):
    monkeypatch.setattr("metagpt_fast.merging._window_nbytes", lambda memory: 1)
    made = random_states(73, [(BF16,)] * 2, {"w": (600_000,)})
    made[1]["w"].raw[-2:] = np.frombuffer(b"\x80\xff", np.uint8)
    base, (model,) = write_family(family.folder / "large", made)
    family.arguments = [str(base), str(model)]
    refuse(family, "tensor 'w' of m0 holds NaN or Inf", "got 1 such elements, the first at index 599999")


def test_the_base_may_hold_anything_where_it_is_not_used(family):
    nonfinite(0, np.nan)(family)
    family.options += ["--method", "linear", "-o", str(family.folder / "out")]
    result = CliRunner().invoke(cli, ["merge", *family.arguments, *family.options, "--quiet"])
    assert result.exit_code == 0, result.output
    assert np.isfinite(read_state(family.folder / "out")["model.layers.0.w"].values).all()


def test_too_little_space_is_found_before_the_work(family, monkeypatch):
    stats = SimpleNamespace(f_bavail=1, f_frsize=1024, f_blocks=1000, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: stats)
    refuse(family, "too little free space", "got 1.02 kB free", "expected 4.3", "free some space")


def test_a_folder_without_permission(family, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    refuse(family, "is not writable", "got no write permission", "choose another output")


def test_broken_config(family):
    (family.base / "config.json").write_text("{")
    refuse(family, "config.json", "not valid JSON")


def test_the_hint_about_vocabularies_works_when_it_is_followed(family):
    other_vocabulary(family)
    refuse(family, "take the base's with --exclude 'embed_tokens|lm_head'")
    out = family.folder / "out"
    arguments = ["merge", *family.arguments, "-o", str(out), "--exclude", "embed_tokens|lm_head"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    merged = read_state(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert merged[name].raw.tobytes() == states()[0][name].raw.tobytes()


def test_a_file_that_grows_while_it_is_read(family, monkeypatch):
    """A download that is still under way: found at the end at the latest."""
    merge = LayerPass.merge

    def merge_and_append(self, writer):
        merge(self, writer)
        with family.shard(1).open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(LayerPass, "merge", merge_and_append)
    result = CliRunner().invoke(cli, ["merge", *family.arguments, "-o", str(family.folder / "out"), "--quiet"])
    assert result.exit_code == 1
    assert "has changed since it was opened" in result.stderr
    assert sorted(path.name for path in family.folder.iterdir()) == ["base", "m0", "m1"]


def test_a_tensor_in_two_shards(family):
    content = shard_bytes(states()[1], ["model.layers.0.w"])
    folder = write_shards(family.folder / "twice", {"a.safetensors": content, "b.safetensors": content}, {"x": 1})
    index = {"weight_map": {"model.layers.0.w": "a.safetensors", "other": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    family.arguments[1] = str(folder)
    refuse(family, "tensor is in two shards", "'model.layers.0.w'")
