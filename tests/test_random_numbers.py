"""The random numbers of masks: published answers, and what a mask depends on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from metagpt_fast.operations.masks import random_stream
from metagpt_fast.reference_masks import philox4x32, uniforms

# The known answers that the authors of the generator publish with their library: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    """Return numbers written in hexadecimal."""
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    low, high = words(key)
    result = philox4x32(np.array(words(counter), np.uint64)[:, None], low | high << 32)
    assert result[:, 0].tolist() == words(expected)


def test_an_element_takes_its_word_of_its_block():
    numbers = uniforms(0x0123456789ABCDEF, 11)
    block = philox4x32(np.array([2, 0, 0, 0], np.uint64)[:, None], 0x0123456789ABCDEF)
    assert numbers[8:].tolist() == block[:3, 0].tolist()


def test_a_stream_is_named_by_seed_tensor_and_model():
    digest = hashlib.blake2b(b"7\0layers.0.weight\0" + b"2", digest_size=8).digest()
    assert random_stream(7, "layers.0.weight", 2) == int.from_bytes(digest, "little")
    others = {random_stream(seed, name, model) for seed in (0, 1) for name in ("a", "b") for model in (0, 1)}
    assert len(others) == 8
