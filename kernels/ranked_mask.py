"""DELLA's masks: the probability to be kept depends on the rank within the row (Deep et al., arXiv 2406.11617).

torch sorts the rows; what is drawn is the CPU's.
"""

import triton
import triton.language as tl

from .masks import number_of


@triton.jit
def ranked_mask_kernel(
    order_ptr,  # int64 [rows, C]: the elements of each row in ascending order of their keys, by their column
    probabilities_ptr,  # int64 [C]: by rank, in units of 2^-32
    stream_ptr,  # int64 [1]
    mask_ptr,  # uint8 [rows * C], written
    first,  # the first of these rows' elements in the tensor
    numel,
    C,
    BLOCK: tl.constexpr,
):
    """Keep elements whose random number is below the probability of their rank."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < numel
    element = place // C * C + tl.load(order_ptr + place, mask=exists, other=0)
    probability = tl.load(probabilities_ptr + place % C, mask=exists, other=0)
    number = number_of(tl.load(stream_ptr), first + element)
    tl.store(mask_ptr + element, (number < probability).to(tl.uint8), mask=exists)
