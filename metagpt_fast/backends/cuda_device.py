"""A CUDA device behind the device interface, by way of the compiled module ``metagpt_fast._cuda``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import BackendError
from .launch_tables import Launch
from .sparse_tables import SectionedLaunch


def load_module() -> Any:
    """Return the compiled module.

    Raises:
        BackendError: this installation has none, or it cannot be loaded.
    """
    try:
        from .. import _cuda  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) or "_cuda" in str(error)
        raise BackendError(
            "this installation has no CUDA kernels",
            where="device",
            expected="a CUDA toolkit (nvcc) at the time of the build" if missing else str(error),
            hint="install a toolkit and then the package again, with METAGPT_FAST_CUDA=ON to be told what is missing",
        ) from error
    return _cuda


def list_devices() -> list[dict[str, Any]]:
    """Return name, compute capability and memory of every device.

    Raises:
        BackendError: there are no kernels, no driver, or no devices; it says which.
    """
    module = load_module()
    try:
        devices: list[dict[str, Any]] = module.devices()
    except RuntimeError as error:
        raise BackendError("no GPU can be used", where="device", got=str(error)) from error
    if not devices:
        raise BackendError("no GPU can be used", where="device", got="a CUDA driver that reports no devices")
    return devices


def versions() -> dict[str, str]:
    """Return the CUDA version that the driver is for, and the one that this package was built with."""
    module = load_module()
    numbers = {"driver": module.driver_version(), "runtime": module.runtime_version()}
    return {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in numbers.items()}


class CudaDevice:
    """One GPU; see :class:`~metagpt_fast.backends.device.Device`.

    Args:
        index: its number, as the driver counts.

    Raises:
        BackendError: there is no such device, or none at all.
    """

    def __init__(self, index: int = 0) -> None:
        devices = list_devices()
        if not 0 <= index < len(devices):
            names = ", ".join(f"cuda:{number} ({each['name']})" for number, each in enumerate(devices))
            raise BackendError("there is no such GPU", where="device", got=f"cuda:{index}", expected=names)
        self.name = f"cuda:{index} ({devices[index]['name']})"
        self._module = load_module()
        self._memory: set[int] = set()
        self._pinned: set[int] = set()
        self._streams: list[int] = []
        self._events: list[int] = []
        self._call(self._module.set_device, index)

    def allocate(self, nbytes: int) -> int:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        address: int = self._call(self._module.allocate, nbytes)
        self._memory.add(address)
        return address

    def allocate_pinned(self, nbytes: int) -> int:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        address: int = self._call(self._module.allocate_pinned, nbytes)
        self._pinned.add(address)
        return address

    def free(self, address: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._memory.discard(address)
        self._call(self._module.free, address)

    def free_pinned(self, address: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._pinned.discard(address)
        self._call(self._module.free_pinned, address)

    def make_stream(self) -> int:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._streams.append(self._call(self._module.make_stream))
        return self._streams[-1]

    def make_event(self, *, is_timed: bool = False) -> int:
        """See :class:`~metagpt_fast.backends.device.Device`; a timed one is for ``seconds_between``."""
        self._events.append(self._call(self._module.make_event, is_timed))
        return self._events[-1]

    def copy_to_device(self, stream: int, to: int, source: int, nbytes: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(self._module.copy_async, to, source, nbytes, stream)

    def copy_to_host(self, stream: int, to: int, source: int, nbytes: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(self._module.copy_async, to, source, nbytes, stream)

    def record(self, event: int, stream: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(self._module.record, event, stream)

    def wait(self, stream: int, event: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(self._module.wait, stream, event)

    def synchronize(self, event: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(self._module.synchronize, event)

    def seconds_between(self, first: int, second: int) -> float:
        """Return the time between two timed events that are over, in seconds."""
        seconds: float = self._call(self._module.seconds_between, first, second)
        return seconds

    def layer_gram(self, stream: int, launch: Launch, scratch: int, gram: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(
            self._module.layer_gram,
            launch.table_address,
            launch.num_tensors,
            launch.num_operands,
            launch.has_base,
            launch.num_blocks,
            launch.num_spans,
            launch.kinds,
            scratch,
            gram,
            stream,
        )

    def layer_merge(self, stream: int, launch: Launch, num_nonfinite: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self._call(
            self._module.layer_merge,
            launch.table_address,
            launch.num_tensors,
            launch.num_operands,
            launch.has_base,
            launch.num_blocks,
            launch.kinds,
            num_nonfinite,
            stream,
        )

    def count_keys(self, stream: int, launch: SectionedLaunch, what: int, counts: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        (wanted,) = launch.sections
        numbers = launch.key_kind, launch.num_keys, launch.num_ranks
        self._call(self._module.count_keys, *_sparse_table(launch), what, wanted, *numbers, counts, stream)

    def layer_moments(self, stream: int, launch: SectionedLaunch, scratch: int, moments: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        (masks,) = launch.sections
        rest = launch.num_spans, masks, launch.key_kind, scratch, moments, stream
        self._call(self._module.layer_moments, *_sparse_table(launch), *rest)

    def layer_elect(self, stream: int, launch: SectionedLaunch, num_nonfinite: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        masks, election = launch.sections
        rest = masks, launch.key_kind, election, num_nonfinite, stream
        self._call(self._module.layer_elect, *_sparse_table(launch), *rest)

    def ranked_masks(self, stream: int, launch: SectionedLaunch, scratch: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        masks, ranks = launch.sections
        rest = masks, launch.key_kind, ranks, launch.num_rows, launch.num_items, scratch, stream
        self._call(self._module.ranked_masks, *_sparse_table(launch), *rest)

    def column_gram(self, stream: int, launch: SectionedLaunch, gram: int, open_sums: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        (matrices,) = launch.sections
        table = launch.table_address, launch.num_tensors, launch.num_operands, launch.has_base
        self._call(self._module.column_gram, *table, matrices, launch.num_sums, gram, open_sums, stream)

    def column_merge(self, stream: int, launch: SectionedLaunch, coefficients: int, num_nonfinite: int) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        (matrices,) = launch.sections
        table = launch.table_address, launch.num_tensors, launch.num_operands, launch.has_base
        rest = matrices, launch.num_blocks, coefficients, num_nonfinite, stream
        self._call(self._module.column_merge, *table, *rest)

    def drain(self) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        with contextlib.suppress(RuntimeError):  # the error that led here is the one to report
            self._module.drain()

    def close(self) -> None:
        """See :class:`~metagpt_fast.backends.device.Device`."""
        self.drain()
        for call, handle in self._owned():
            with contextlib.suppress(RuntimeError):
                call(handle)
        for owned in (self._memory, self._pinned, self._streams, self._events):
            owned.clear()

    def _owned(self) -> Iterator[tuple[Callable[[int], None], int]]:
        module = self._module
        for call, handles in (
            (module.free, self._memory),
            (module.free_pinned, self._pinned),
            (module.destroy_stream, self._streams),
            (module.destroy_event, self._events),
        ):
            for handle in handles:
                yield call, handle

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            hint = "give a smaller --device-memory" if "memory" in str(error) else None
            raise BackendError("CUDA failed", where=self.name, got=str(error), hint=hint) from error


def _sparse_table(launch: SectionedLaunch) -> tuple[int, int, int, int]:
    """Return what all sparse kernels take first."""
    return launch.table_address, launch.num_tensors, launch.num_operands, launch.num_blocks
