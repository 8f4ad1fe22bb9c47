"""Room on a device for what the slices of one call add to: Gram matrices, sums, counts."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .device import Device
    from .streaming import Pipeline


class DeviceResults:
    """One array at a time, on the way to the device and back through pinned memory. Grows as needed.

    Args:
        device: where it is.
        pipeline: whose kernels add to it.
    """

    def __init__(self, device: Device, pipeline: Pipeline) -> None:
        self._device = device
        self._stream = pipeline.compute
        self._loaded, self._done = device.make_event(), device.make_event()
        self._is_loading = False
        self._nbytes = self._pinned_nbytes = 0
        self._pinned = self._own = self._address = 0

    def load(self, array: NDArray[Any], address: int | None = None) -> int:
        """Bring an array to the device, in front of everything that is computed from now on. Return its address.

        Args:
            array: what to begin with.
            address: of device memory that it fits; default memory of its own.
        """
        if self._is_loading:  # the last array may be on its way out of the same pinned memory
            self._device.synchronize(self._loaded)
        if array.nbytes > self._pinned_nbytes:
            if self._pinned_nbytes:
                self._device.free_pinned(self._pinned)
            self._pinned_nbytes = array.nbytes
            self._pinned = self._device.allocate_pinned(array.nbytes)
        if address is None and array.nbytes > self._nbytes:
            if self._nbytes:
                self._device.free(self._own)
            self._nbytes = array.nbytes
            self._own = self._device.allocate(array.nbytes)
        self._address = self._own if address is None else address
        ctypes.memmove(self._pinned, array.ctypes.data, array.nbytes)
        self._device.copy_to_device(self._stream, self._address, self._pinned, array.nbytes)
        self._device.record(self._loaded, self._stream)
        self._is_loading = True
        return self._address

    def store(self, array: NDArray[Any]) -> None:
        """Bring it back, after all that was computed, and wait for it."""
        self._device.copy_to_host(self._stream, self._pinned, self._address, array.nbytes)
        self._device.record(self._done, self._stream)
        self._device.synchronize(self._done)
        self._is_loading = False
        ctypes.memmove(array.ctypes.data, self._pinned, array.nbytes)
