"""Mask rules: which elements of a task vector δ a sparse method keeps, before anything is measured.

An operation (:mod:`metagpt_fast.operations.sparse`) turns a rule into the numbers that the kernels take. Magnitudes are
compared in float32; among equal ones the lowest index comes first, so that exactly as many are kept as were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Every element."""


@dataclass(frozen=True, slots=True)
class KeepNone:
    """No element."""


@dataclass(frozen=True, slots=True)
class KeepRanks:
    """The elements of rank ``first`` to ``first + count − 1``, rank 0 being the largest magnitude of the tensor."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class KeepAbove:
    """Elements with |δ| > ``magnitude``."""

    magnitude: float


@dataclass(frozen=True, slots=True)
class KeepRandomly:
    """Each element with this probability, drawn anew for each seed, tensor and model."""

    probability: float
    seed: int


@dataclass(frozen=True, slots=True)
class KeepByRank:
    """Each element with a probability from ``low`` to ``high``, linear in the rank of its magnitude in its row."""

    low: float
    high: float
    seed: int


@dataclass(frozen=True, slots=True)
class KeepVariable:
    """The int(``fraction`` · n) elements with the largest variance across models, n being those where it is not 0."""

    fraction: float


@dataclass(frozen=True, slots=True)
class KeepImportant:
    """Elements whose |δ| · KL(row) reaches the tensor's median + 1.5 · (third quartile − first quartile)."""


@dataclass(frozen=True, slots=True)
class KeepNear:
    """Every element, weighted by min(``t`` / max(|δ|, 1e-6), 1)."""

    t: float


Rule = KeepAll | KeepNone | KeepRanks | KeepAbove | KeepRandomly | KeepByRank | KeepVariable | KeepImportant | KeepNear
