"""Every Triton kernel, compiled ahead of time for GPUs that need not be there: wide loads, and nothing spilled.

A few targets and numbers of models are compiled in every run. METAGPT_FAST_TEST_TARGETS=all compiles every kernel for
every target with 1 to 8 models of every dtype, which takes half an hour of one core.
"""

from __future__ import annotations

import os
import re

import pytest

from metagpt_fast.dtypes import BF16, F16, F32, F64
from metagpt_fast.kernels import launch

triton = pytest.importorskip("triton")

from .triton_cases import BUILDERS, VARIANCE, gram, merge, sparse_keys  # noqa: E402 - these import Triton
from .triton_compiler import AMD, TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and compiles not")

WIDE_LOAD = r"\bld\.global[.\w:]*\.(v4\.b32|v2\.b64)\b|\b(buffer|global)_load_dwordx4\b"
WIDE_STORE = r"\bst\.global[.\w:]*\.(v4\.b32|v2\.b64)\b|\b(buffer|global)_store_dwordx4\b"
LOCAL_MEMORY = r"\b(ld|st)\.local\b|\bscratch_(load|store)_"
# Registers per thread. 128 leave a multiprocessor 16 warps, each with 2 loads of 16 bytes per operand under way.
FEW_REGISTERS, MANY_REGISTERS = 128, 192
ALL = os.environ.get("METAGPT_FAST_TEST_TARGETS") == "all"


def codes_of(dtype, num_models):
    return (int(dtype.code),) * (num_models + 1)


FOUR = codes_of(BF16, 3)
CASES = [(name, FOUR, "sm_90") for name in BUILDERS]
CASES += [(name, FOUR, target) for name in ("layer_gram", "layer_merge") for target in ("sm_80", "gfx942")]
CASES += [("layer_elect", FOUR, "gfx942"), ("layer_merge", codes_of(F32, 8), "sm_80")]
CASES += [("layer_gram", codes_of(F16, 8), "sm_90"), ("layer_merge", codes_of(F64, 3), "sm_80")]
if ALL:
    CASES = [
        (name, codes_of(dtype, num_models), target)
        for name in BUILDERS
        for dtype in (F32, F16, BF16, F64)
        for num_models in range(1, 9)
        for target in TARGETS
        if not (name == "layer_gram" and dtype is F64)  # layer_gram_wide takes these
    ]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compile anew, and leave nothing in the user's folder."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize(("name", "codes", "target"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_kernel(name, codes, target):
    case = BUILDERS[name](codes)
    compiled = case.compile(target)
    if compiled.stack_nbytes:  # fp64 division is a call, for which the assembler may set aside bytes that nothing uses
        assert target not in AMD
        is_used = re.findall(r"\b(LDL|STL)\b", compiled.machine_code)
        # One program per tensor: a number kept in memory costs it nothing (F32, two models, sm_120: 8 bytes).
        assert not is_used or (name == "layer_threshold_index" and compiled.stack_nbytes <= 16)
    assert compiled.count(LOCAL_MEMORY) == 0
    if target not in AMD:
        is_dense = name in {"layer_gram", "layer_merge"}
        assert compiled.num_registers <= (FEW_REGISTERS if is_dense and len(codes) <= 4 else MANY_REGISTERS)
    # All of a thread's weights come by 16 bytes, where it has as many; the last tile of a tensor is read by elements.
    if case.load_nbytes is not None and case.load_nbytes >= 16 * len(codes):
        assert compiled.count(WIDE_LOAD) >= case.load_nbytes // 16
        assert compiled.count(WIDE_STORE) >= case.store_nbytes // 16


@pytest.mark.parametrize("alignment", [launch.NATURAL, launch.BYTES])
def test_kernels_for_tensors_that_lie_anywhere(alignment):
    for builder in (gram, merge):
        compiled = builder(codes_of(BF16, 1), alignment).compile("sm_90")
        assert compiled.stack_nbytes == 0
        assert compiled.count(WIDE_LOAD) == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_products_and_sums_are_not_fused_where_bits_count(target):
    """The variance that SCE ranks by is products and sums, each rounded: by Triton, and by the assembler after it."""
    compiled = sparse_keys(FOUR, key_kind=VARIANCE).compile(target)
    assert len(re.findall(r"\b(DMUL|v_mul_f64)", compiled.machine_code)) >= 8
    assert not re.findall(r"\b(DFMA|v_(pk_)?fmac?_f64)", compiled.machine_code)
