"""Measures the bus of a GPU: copies from pinned memory and back, of the size of a streamed merge's slices."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..errors import BackendError
from .rates import BusRates

if TYPE_CHECKING:
    from ..backends.device import Device

_COPY_NBYTES = 8 << 20
_NUM_COPIES = 64


def find_bus() -> tuple[BusRates | None, str]:
    """Return the rates of the first GPU that a merge can use, if there is one, and why there is none."""
    from ..backends.cuda_device import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        return None, error.what if error.got is None else f"{error.what}: {error.got}"
    try:
        return measure_bus(device), ""
    except BackendError as error:
        return None, str(error)
    finally:
        device.close()


def measure_bus(device: Device) -> BusRates:
    """Return how fast copies to a device and back are.

    Raises:
        BackendError: the device failed, or has no memory for it.
    """
    pinned, address = device.allocate_pinned(_COPY_NBYTES), device.allocate(_COPY_NBYTES)
    stream, done = device.make_stream(), device.make_event()
    rates = []
    for copy, to, source in ((device.copy_to_device, address, pinned), (device.copy_to_host, pinned, address)):
        for num_copies in (2, _NUM_COPIES):  # the first ones wake the bus
            started = time.perf_counter()
            for _ in range(num_copies):
                copy(stream, to, source, _COPY_NBYTES)
            device.record(done, stream)
            device.synchronize(done)
            seconds = time.perf_counter() - started
        rates.append(_NUM_COPIES * _COPY_NBYTES / seconds)
    device.free(address)
    device.free_pinned(pinned)
    return BusRates(device.name, rates[0], rates[1])
