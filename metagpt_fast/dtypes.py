"""The tensor dtypes of safetensors files: names, sizes, and which of them the kernels take.

A dtype is added here, in ``csrc/core/dtype.h`` and in ``csrc/cpu/vec_<isa>.h``; CONTRIBUTING.md has the list.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RecipeError


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype of the safetensors format.

    Attributes:
        name: the name in a safetensors header, such as ``"BF16"``.
        bits: bits per element (4 for the packed sub-byte dtypes).
        code: number of the dtype in the kernels' interface; ``None`` where the kernels do not take it.
        numpy_name: NumPy's name, ``None`` where NumPy itself has none (``bfloat16`` comes from ml_dtypes).
        torch_name: the value that ``config.json`` calls ``torch_dtype``.
    """

    name: str
    bits: int
    code: int | None = None
    numpy_name: str | None = None
    torch_name: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes per element; raises ValueError for the packed sub-byte dtypes."""
        if self.bits % 8:
            raise ValueError(f"{self.name} has no whole number of bytes per element")
        return self.bits // 8

    @property
    def is_mergeable(self) -> bool:
        """Whether the kernels compute with this dtype. Others are copied from the base, if all inputs agree."""
        return self.code is not None

    def nbytes(self, numel: int) -> int | None:
        """Bytes of ``numel`` elements, or None where that is not a whole number of bytes."""
        bits = numel * self.bits
        return bits // 8 if bits % 8 == 0 else None

    def __str__(self) -> str:
        return self.name


F32 = DType("F32", 32, code=0, numpy_name="float32", torch_name="float32")
F16 = DType("F16", 16, code=1, numpy_name="float16", torch_name="float16")
BF16 = DType("BF16", 16, code=2, torch_name="bfloat16")
F64 = DType("F64", 64, code=3, numpy_name="float64", torch_name="float64")

DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        F32,
        F16,
        BF16,
        F64,
        DType("BOOL", 8, numpy_name="bool"),
        DType("U8", 8, numpy_name="uint8"),
        DType("I8", 8, numpy_name="int8"),
        DType("U16", 16, numpy_name="uint16"),
        DType("I16", 16, numpy_name="int16"),
        DType("U32", 32, numpy_name="uint32"),
        DType("I32", 32, numpy_name="int32"),
        DType("U64", 64, numpy_name="uint64"),
        DType("I64", 64, numpy_name="int64"),
        DType("C64", 64, numpy_name="complex64"),
        DType("F8_E4M3", 8),
        DType("F8_E5M2", 8),
        DType("F8_E4M3FNUZ", 8),
        DType("F8_E5M2FNUZ", 8),
        DType("F8_E8M0", 8),
        DType("F4", 4),
        DType("F6_E2M3", 6),
        DType("F6_E3M2", 6),
    )
}
MERGEABLE: tuple[DType, ...] = tuple(d for d in DTYPES.values() if d.is_mergeable)
_INTEGER_NAMES = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

# What --dtype takes. "keep" (the base's dtype, tensor by tensor) is handled by the caller.
OUTPUT_DTYPES: dict[str, DType] = {"bf16": BF16, "f16": F16, "f32": F32, "f64": F64}
_ALIASES = {
    "bfloat16": BF16,
    "float16": F16,
    "half": F16,
    "float32": F32,
    "float": F32,
    "float64": F64,
    "double": F64,
}


def is_integer(dtype: DType) -> bool:
    """Whether ``dtype`` is one of the integer or boolean dtypes, which are copied and never merged."""
    return dtype.name in _INTEGER_NAMES


def parse_output_dtype(text: str) -> DType | None:
    """Return the dtype that ``text`` names (``bf16``, ``bfloat16``, ``BF16`` ...), or None for ``keep``.

    Raises:
        RecipeError: ``text`` is none of them.
    """
    lowered = text.lower()
    if lowered == "keep":
        return None
    found = OUTPUT_DTYPES.get(lowered) or _ALIASES.get(lowered)
    if found is None:
        raise RecipeError("unknown dtype", where="dtype", got=repr(text), expected="keep, " + ", ".join(OUTPUT_DTYPES))
    return found
