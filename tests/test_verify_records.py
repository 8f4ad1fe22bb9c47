"""verify: records that are broken, or make no sense, end in one message."""

from __future__ import annotations

import pytest

import metagpt_fast as mf

from .damaged_outputs import edit_json, merged, out
from .test_every_method import case_id

__all__ = ["merged", "out"]  # fixtures


def recorded(**changes):
    return {"name": "a", "nbytes": 1, "crc32c": "00000000", "tensors": [], **changes}


BROKEN_RECORDS = {
    "not JSON": "{",
    "a list": "[]",
    "empty": "{}",
    "a shard outside": {"output": {"shards": [recorded(name="../model.safetensors")]}},
    "a shard twice": {"output": {"shards": [recorded()] * 2}},
    "a negative size": {"output": {"shards": [recorded(nbytes=-1)]}},
    "a size beyond int64": {"output": {"shards": [recorded(nbytes=1 << 63)]}},
    "a checksum of seven digits": {"output": {"shards": [recorded(crc32c="0000000")]}},
    "a checksum that is a number": {"output": {"shards": [recorded(crc32c=0)]}},
    "tensors larger than their file": {
        "output": {"shards": [recorded(tensors=[{"name": "t", "nbytes": 2, "crc32c": "00000000"}])]}
    },
    "a tensor without a checksum": {"output": {"shards": [recorded(tensors=[{"name": "t", "nbytes": 1}])]}},
    "no shards": {"output": {"shards": []}},
    "shards are texts": {"output": {"shards": "model.safetensors"}},
    "scopes": {"scopes": []},
    "coefficients": {"coefficients": [["1"]]},
    "a coefficient beyond float64": {"coefficients": [[10**400]]},
    "fingerprints": {"fingerprints": [1]},
    "models": {"models": [1]},
}


@pytest.mark.parametrize("change", BROKEN_RECORDS.values(), ids=BROKEN_RECORDS)
def test_broken_records_are_refused(out, change):
    path = out / "metagpt_fast.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        edit_json(path, lambda content: content.update(change))
    with pytest.raises(mf.CheckpointError, match="record"):
        mf.verify(out)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "no_such_method"},
        {"parameters": {"exponent": "high"}},
        {"granularity": "galaxy"},
        {"exclude": "("},
        {"out_dtype": "q4"},
        {"backend": "gpu"},
        {"recipe": "merge_method: ["},
        {"recipe": "merge_method: \ud800"},
        {"recipe": "merge_method: ties\0"},
        {"recipe": "#" * (1 << 20) + "!"},
        {"base": "a\0b"},
        {"out": "../../../etc"},
        {"scopes": ["other"]},
    ],
    ids=case_id,
)
def test_records_that_make_no_sense(out, change):
    """One message, as a note or as a problem, and no exception."""
    edit_json(out / "metagpt_fast.json", lambda content: content.update(change))
    report = mf.verify(out, full=True)
    assert len(report.problems) <= 1, report.problems
    assert bool(report.problems) == ("out" not in change and "scopes" not in change)
