"""The compiled kernels (``metagpt_fast._core``), with types, and a clear error where they are missing.

Tables describe a layer of K tensors with V operands each (``[base, model_0 ...]``, or the models alone):

* ``addresses``: uint64 ``[K, V]``, address in memory, or byte offset in the file;
* ``files``: int32 ``[K, V]``, -1 for memory, else an open file descriptor that is read with ``pread``;
* ``dtypes``: uint8 ``[K, V]``, :attr:`metagpt_fast.dtypes.DType.code`;
* ``numels``: int64 ``[K]``, elements.

Memory needs no alignment. The callers answer for the addresses: nothing here can check them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

from .errors import BackendError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tensors = tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]
    """Addresses, files, dtypes and numels of a layer."""

try:
    from . import _core as _compiled  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:
    raise BackendError(
        "the compiled kernels cannot be loaded",
        where="metagpt_fast._core",
        got=str(error),
        hint="install the package with `pip install .`; it needs a C++20 compiler",
    ) from error

_core: Any = _compiled


class _FileOperandError(Protocol):
    """An OSError with the place of the failure: ``operand`` is -1 for the output."""

    errno: int
    strerror: str
    tensor: int
    operand: int


FileOperandError = cast("type[OSError]", _core.FileOperandError)
"""OSError raised when a file operand cannot be read or written; has ``tensor`` and ``operand`` (-1: output)."""

InputChangedError = cast("type[RuntimeError]", _core.InputChangedError)
"""RuntimeError raised by a kernel that reads its input twice and met other values the second time."""

SPAN_NUMEL: int = _core.SPAN_NUMEL
"""Elements per work item. Pieces of a tensor that are multiples of it keep the Gram matrix's bits."""


def place_of(error: OSError) -> tuple[int, int]:
    """Return ``(tensor, operand)`` of a FileOperandError; operand -1 is the output."""
    placed = cast("_FileOperandError", error)
    return placed.tensor, placed.operand


def file_operand_error(error: OSError, tensor: int, operand: int) -> OSError:
    """Return the FileOperandError of something else than a kernel that met ``error``."""
    placed = FileOperandError(error.errno, error.strerror)
    vars(placed).update(tensor=tensor, operand=operand)
    return placed


@contextmanager
def operand_errors_of(tensors: Sequence[int] | NDArray[np.int64]) -> Iterator[None]:
    """Let a FileOperandError of the block, which counts some of a layer's tensors, say which of the layer's it is."""
    try:
        yield
    except FileOperandError as error:
        tensor, operand = place_of(error)
        raise file_operand_error(error, int(tensors[tensor]), operand) from error


def layer_gram(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    has_base: bool,
    gram: NDArray[np.float64],
) -> None:
    """Add every tensor's Gram matrix of ``[base, τ_0 ...]`` to ``gram``, float64 ``[K, V, V]``, in place."""
    _core.layer_gram(addresses, files, dtypes, numels, has_base, gram)


def layer_merge(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    has_base: bool,
    coefficients: NDArray[np.float64],
    out_addresses: NDArray[np.uint64],
    out_files: NDArray[np.int32],
    out_dtypes: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Write ``base + Σ c_t τ_t`` of every tensor; ``coefficients`` float64 ``[K, T]``.

    Returns:
        int64 ``[K]``: how many elements of each result are NaN or Inf; uint32 ``[K]``: the CRC32C of its bytes, 0 for
        results in memory.
    """
    return cast(
        "tuple[NDArray[np.int64], NDArray[np.uint32]]",
        _core.layer_merge(
            addresses, files, dtypes, numels, has_base, coefficients, out_addresses, out_files, out_dtypes
        ),
    )


def layer_nonfinite(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    has_base: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count NaN and Inf in every operand.

    Returns:
        int64 ``[K, V]`` counts, and int64 ``[K, V]`` indices of the first such element (-1: none).
    """
    return cast(
        "tuple[NDArray[np.int64], NDArray[np.int64]]",
        _core.layer_nonfinite(addresses, files, dtypes, numels, has_base),
    )


def layer_row_divergence(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    columns: NDArray[np.int64],
    divergences: NDArray[np.uint64],
) -> None:
    """Compute the divergence of every row of the model (operand 1) from the base's (operand 0).

    ``columns``: int64 ``[K]``, elements of a row; ``divergences``: uint64 ``[K]``, addresses of float64
    ``[numel / columns]`` for the results.
    """
    _core.layer_row_divergence(addresses, files, dtypes, numels, columns, divergences)


def column_gram(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    has_base: bool,
    columns: NDArray[np.int64],
    grams: NDArray[np.uint64],
) -> None:
    """Add the Gram matrix of every column; ``grams``: uint64 ``[K]``, addresses of float64 ``[C, V, V]``."""
    _core.column_gram(addresses, files, dtypes, numels, has_base, columns, grams)


def column_merge(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    has_base: bool,
    columns: NDArray[np.int64],
    coefficients: NDArray[np.uint64],
    out_addresses: NDArray[np.uint64],
    out_files: NDArray[np.int32],
    out_dtypes: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """As :func:`layer_merge`; ``coefficients``: uint64 ``[K]``, addresses of float64 ``[C, T]``."""
    return cast(
        "tuple[NDArray[np.int64], NDArray[np.uint32]]",
        _core.column_merge(
            addresses,
            files,
            dtypes,
            numels,
            has_base,
            columns,
            coefficients,
            out_addresses,
            out_files,
            out_dtypes,
        ),
    )


def inspect_dlpack(
    capsule: object,
) -> tuple[int, tuple[int, int, int], tuple[int, ...], tuple[int, ...] | None, tuple[int, int]]:
    """Return address, (type code, bits, lanes), shape, strides in elements, (device type, index) of a capsule."""
    return cast(
        "tuple[int, tuple[int, int, int], tuple[int, ...], tuple[int, ...] | None, tuple[int, int]]",
        _core.inspect_dlpack(capsule),
    )


def bandwidth_read(address: int, nbytes: int) -> int:
    """Read memory once with the kernels' threads: the ceiling of ``layer_gram``. Returns a checksum."""
    return cast("int", _core.bandwidth_read(address, nbytes))


def bandwidth_triad(a: int, b: int, c: int, numel: int) -> None:
    """Compute ``a = b + 3·c`` on float32 arrays with the kernels' threads: the ceiling of ``layer_merge``."""
    _core.bandwidth_triad(a, b, c, numel)


def guard_mapping(address: int, nbytes: int) -> int:
    """Guard a mapped file against SIGBUS until ``unguard_mapping``; returns the guard's number.

    A page of it that cannot be read, because the file was truncated or its disk failed, is replaced by zeros together
    with all pages behind it, and remembered: ask ``fault_offset`` before using what a kernel made of it.
    """
    return cast("int", _core.guard_mapping(address, nbytes))


def unguard_mapping(guard: int) -> None:
    """End a guard; call it before the file is unmapped."""
    _core.unguard_mapping(guard)


def fault_offset(guard: int) -> int:
    """Return where the first page that could not be read begins, in bytes from the mapping's start; -1: none."""
    return cast("int", _core.fault_offset(guard))


def supported_isas() -> list[str]:
    """Return the instruction sets that this build and processor support, slowest first."""
    return cast("list[str]", _core.supported_isas())


def isa() -> str:
    """Return the instruction set in use: ``set_isa``, else ``METAGPT_FAST_ISA``, else the best supported.

    Raises:
        BackendError: the variable names one that this machine does not support.
    """
    try:
        return cast("str", _core.isa())
    except ValueError as error:
        raise BackendError(str(error), hint="unset the variable or choose a supported one") from None


def set_isa(name: str) -> None:
    """Choose the instruction set for this process: ``scalar``, ``avx2``, ``avx512``, ``neon`` or ``auto``.

    Raises:
        BackendError: this build or processor does not support it.
    """
    try:
        _core.set_isa(name)
    except ValueError as error:
        raise BackendError(str(error)) from None


def num_threads() -> int:
    """Return the threads a kernel call uses: ``set_num_threads``, else ``METAGPT_FAST_THREADS``, else all processors.

    Raises:
        RecipeError: the variable is not a number from 1 to 1024.
    """
    try:
        return cast("int", _core.num_threads())
    except ValueError as error:
        raise RecipeError(str(error)) from None


def set_num_threads(num_threads: int) -> None:
    """Choose the number of threads for this process; 0 returns to the default.

    Raises:
        RecipeError: not from 0 to 1024.
    """
    try:
        _core.set_num_threads(num_threads)
    except (ValueError, TypeError):
        raise RecipeError("number of threads", where="threads", got=num_threads, expected="1 to 1024") from None


def layer_threshold(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    columns: NDArray[np.int64],
    row_factors: NDArray[np.uint64],
    key_kind: int,
    ranks: NDArray[np.int64],
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Find the elements of these ranks, int64 ``[K, J, R]``, among each tensor's keys; J is 1 for variance, else T.

    Returns:
        uint32 ``[K, J, R]`` keys, and int64 ``[K, J, R]`` indices. For rank −1: 2^32 − 1 and −1.

    Raises:
        ValueError: a rank that the tensor does not have, or columns that do not divide its elements.
    """
    return cast(
        "tuple[NDArray[np.uint32], NDArray[np.int64]]",
        _core.layer_threshold(addresses, files, dtypes, numels, columns, row_factors, key_kind, ranks),
    )


def layer_count_nonzero(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    columns: NDArray[np.int64],
    row_factors: NDArray[np.uint64],
    key_kind: int,
) -> NDArray[np.int64]:
    """Count the keys that are above 0: int64 ``[K, J]``; J is 1 for variance, else T."""
    return cast(
        "NDArray[np.int64]",
        _core.layer_count_nonzero(addresses, files, dtypes, numels, columns, row_factors, key_kind),
    )


def layer_moments(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    masks: tuple[Any, ...],
) -> NDArray[np.float64]:
    """Sum over masked task vectors: float64 ``[K, T, 6]``. ``masks``: the fields of a MaskTable, in order."""
    return cast("NDArray[np.float64]", _core.layer_moments(addresses, files, dtypes, numels, masks))


def layer_elect(
    addresses: NDArray[np.uint64],
    files: NDArray[np.int32],
    dtypes: NDArray[np.uint8],
    numels: NDArray[np.int64],
    masks: tuple[Any, ...],
    election: tuple[Any, ...],
    out: tuple[Any, ...],
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Combine masked task vectors element by element, and write the results; returns what :func:`layer_merge` does.

    ``masks``, ``election`` and ``out`` are the fields of a MaskTable, a LayerElection and an OutputTable, in order.
    """
    return cast(
        "tuple[NDArray[np.int64], NDArray[np.uint32]]",
        _core.layer_elect(addresses, files, dtypes, numels, masks, election, out),
    )


def crc32c(data: bytes | memoryview | NDArray[np.uint8]) -> int:
    """Return the CRC32C (Castagnoli; RFC 3720) of contiguous bytes."""
    return cast("int", _core.crc32c(data))


def crc32c_of_memory(addresses: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the CRC32C of N runs of memory, uint32 ``[N]``; computed by the calling thread."""
    return cast("NDArray[np.uint32]", _core.crc32c_of_memory(addresses, nbytes))


def crc32c_of_file(file: int, offsets: NDArray[np.int64], nbytes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the CRC32C of N ranges of an open file, uint32 ``[N]``, which all threads read once.

    Raises:
        FileOperandError: a range, by its number as ``tensor``, cannot be read, or the file ends within it.
    """
    return cast("NDArray[np.uint32]", _core.crc32c_of_file(file, offsets, nbytes))


def crc32c_join(
    crcs: NDArray[np.uint32], nbytes: NDArray[np.int64], owners: NDArray[np.int64], num_owners: int
) -> NDArray[np.uint32]:
    """Return the CRC32C of what parts make up, in order, from their CRC32C and sizes: uint32 ``[num_owners]``.

    ``owners``: int64 ``[N]``, ascending: what each part belongs to. 0, the CRC32C of no bytes, for those without parts.
    """
    return cast("NDArray[np.uint32]", _core.crc32c_join(crcs, nbytes, owners, num_owners))
