"""layer_fused: gram → λ_t = ‖τ_t‖^p / Σ_k ‖τ_k‖^p → merge, without a trip to the host.

This file has the middle step; ``layer_gram`` and ``layer_merge`` are the others. All are launches on one stream:
nothing waits for the device, whatever λ is shared over.
"""

import triton
import triton.language as tl


@triton.jit
def share_of_squares_kernel(
    gram_ptr,  # fp64 [rows, V, V]
    members_ptr,  # int64: rows of all scopes, one scope after the other
    first_members_ptr,  # int64 [scopes + 1]
    exponent_ptr,  # fp64 [1]: p
    coefficients_ptr,  # fp64 [rows, T]
    HAS_BASE: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    MODELS: tl.constexpr,  # T, up to a power of two
    WIDTH: tl.constexpr,  # rows that are added at a time
):
    """Solve one scope; the same λ goes into the rows of all its members.

    As metagpt_fast.methods.metagpt.share_of_squares: all 0 where no model changed anything; with p ≤ 0 a zero task
    vector has no share, except for the equal ones of p = 0. Squared norms are taken relative to the largest (p > 0) or
    the smallest, so that no power overflows.
    """
    size: tl.constexpr = NUM_MODELS + HAS_BASE
    begin = tl.load(first_members_ptr + tl.program_id(0))
    end = tl.load(first_members_ptr + tl.program_id(0) + 1)
    model = tl.arange(0, MODELS)
    is_model = model < NUM_MODELS
    member = tl.arange(0, WIDTH)
    squares = tl.zeros([MODELS], tl.float64)
    for first in range(begin, end, WIDTH):
        is_member = member < end - first
        row = tl.load(members_ptr + first + member, mask=is_member, other=0)
        diagonal = (row[:, None] * size + model[None, :] + HAS_BASE) * size + model[None, :] + HAS_BASE
        squares += tl.sum(tl.load(gram_ptr + diagonal, mask=is_member[:, None] & is_model[None, :], other=0.0), axis=0)

    exponent = tl.load(exponent_ptr)
    changed = is_model & (squares != 0)  # also NaN, which is to spread
    largest = tl.max(squares)
    smallest = tl.min(tl.where(changed, squares, float("inf")))
    reference = tl.where(exponent > 0, largest, smallest)
    reference = tl.where((reference > 0) & (reference < float("inf")), reference, 1.0)
    ratio = tl.where(changed, squares / reference, 1.0)
    logarithm = tl.log(tl.where(changed, squares, 1.0)) - tl.log(reference)
    powers = tl.where(exponent == 2.0, ratio, tl.exp(exponent * 0.5 * logarithm))
    powers = tl.where(changed, powers, 0.0)
    total = tl.sum(powers)
    share = powers / tl.where(total == 0, 1.0, total)
    any_change = tl.sum(changed.to(tl.int32)) > 0
    share = tl.where((exponent == 0.0) & any_change, 1.0 / NUM_MODELS, share)
    for first in range(begin, end):
        row = tl.load(members_ptr + first)
        tl.store(coefficients_ptr + row * NUM_MODELS + model, share, mask=is_model)
