"""An output of several shards for the tests of verify, and what damages it."""

from __future__ import annotations

import json
import shutil

import pytest

import metagpt_fast as mf
from metagpt_fast._native import crc32c
from metagpt_fast.dtypes import BF16
from metagpt_fast.safetensors_file import read_header

from .checkpoints import random_states, write_family


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """An output of several shards, with an excluded tensor; copy it before breaking it."""
    folder = tmp_path_factory.mktemp("merged")
    base, models = write_family(folder, random_states(8, [(BF16,)] * 4))
    mf.merge(base, models, folder / "out", exclude="lm_head", max_shard_size=4096 * 3)
    return folder / "out"


@pytest.fixture
def out(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    record = tmp_path / "out" / "metagpt_fast.json"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert json.loads(record.read_text())["output"]["shards"]
    return tmp_path / "out"


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def problems_of(report, kind):
    return [problem for problem in report.problems if problem.kind == kind]


def forge(out):
    """Make the record agree with the files, as who tampers with both would."""

    def edit(content):
        for shard in content["output"]["shards"]:
            raw = (out / shard["name"]).read_bytes()
            offsets = {source.name: source.data_offset for source in read_header(out / shard["name"]).tensors}
            for each in shard["tensors"]:
                each["crc32c"] = f"{crc32c(raw[offsets[each['name']] :][: each['nbytes']]):08x}"
            shard.update(nbytes=len(raw), crc32c=f"{crc32c(raw):08x}")

    edit_json(out / "metagpt_fast.json", edit)
