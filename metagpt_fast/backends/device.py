"""What the streamed merge asks of a device: memory, copies and kernels on streams, events between them.

The real one is :class:`~metagpt_fast.backends.cuda_device.CudaDevice`; the tests have one that delays and reorders
whatever streams and events allow.
"""

from __future__ import annotations

from typing import Any, Protocol

from .launch_tables import Launch
from .sparse_tables import SectionedLaunch

Stream = Any
"""Work that is carried out in the order in which it was given; nothing is said about two streams without an event."""
Event = Any
"""A place in a stream, once it is recorded."""


class Device(Protocol):
    """One device, used by one thread. Addresses are plain numbers; errors of the driver are BackendError."""

    name: str
    """What people call it: ``cuda:0 (NVIDIA H100 80GB HBM3)``."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of device memory, a multiple of 256."""

    def allocate_pinned(self, nbytes: int) -> int:
        """Return the address of host memory that copies run from and to on their own."""

    def free(self, address: int) -> None:
        """Give device memory back that nothing uses any more."""

    def free_pinned(self, address: int) -> None:
        """Give pinned memory back."""

    def make_stream(self) -> Stream:
        """Return a new stream."""

    def make_event(self) -> Event:
        """Return a new event."""

    def copy_to_device(self, stream: Stream, to: int, source: int, nbytes: int) -> None:
        """Copy from pinned memory. Returns at once; the source must stay as it is until the copy is over."""

    def copy_to_host(self, stream: Stream, to: int, source: int, nbytes: int) -> None:
        """Copy to pinned memory. Returns at once."""

    def record(self, event: Event, stream: Stream) -> None:
        """Put the event behind all that was given to the stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is given to the stream from now on wait for the event's last place."""

    def synchronize(self, event: Event) -> None:
        """Wait until the event's last place is reached."""

    def layer_gram(self, stream: Stream, launch: Launch, scratch: int, gram: int) -> None:
        """Add Gram matrices to float64 ``[rows, V, V]`` at ``gram``. Returns at once.

        ``scratch``: address of room for ``(num_blocks + num_spans) V (V + 1) / 2`` doubles.
        """

    def layer_merge(self, stream: Stream, launch: Launch, num_nonfinite: int) -> None:
        """Write the merged tensors; add counts of NaN and Inf to int64 ``[rows]`` at the address. Returns at once."""

    def count_keys(self, stream: Stream, launch: SectionedLaunch, what: int, counts: int) -> None:
        """Add counts of keys to int64 at ``counts``: see csrc/cuda/layer_threshold.cuh. Returns at once.

        ``what``: one of ``sparse_tables.UPPER_BITS``, ``LOWER_BITS``, ``EQUAL``, ``NONZERO``.
        """

    def layer_moments(self, stream: Stream, launch: SectionedLaunch, scratch: int, moments: int) -> None:
        """Add sums to float64 ``[rows, T, 6]`` at ``moments``. Returns at once.

        ``scratch``: address of room for ``(num_blocks + num_spans) 6 T`` doubles.
        """

    def layer_elect(self, stream: Stream, launch: SectionedLaunch, num_nonfinite: int) -> None:
        """Write the merged tensors; add counts of NaN and Inf to int64 ``[rows]`` at the address. Returns at once."""

    def ranked_masks(self, stream: Stream, launch: SectionedLaunch, scratch: int) -> None:
        """Write the bits of masks by rank. Returns at once.

        ``scratch``: address of room for 9 bytes for each of the launch's items.
        """

    def column_gram(self, stream: Stream, launch: SectionedLaunch, gram: int, open_sums: int) -> None:
        """Add Gram matrices to float64 ``[columns, V, V]`` at ``gram``, of pieces that come in order. Returns at once.

        ``open_sums``: address of float64 ``[columns, V (V + 1) / 2]``, sums that go on in the next piece.
        """

    def column_merge(self, stream: Stream, launch: SectionedLaunch, coefficients: int, num_nonfinite: int) -> None:
        """Write the merged tensors; coefficients float64 ``[columns, T]`` at the address. Returns at once.

        ``num_nonfinite``: as of ``layer_merge``.
        """

    def drain(self) -> None:
        """Wait until nothing is under way; for cleaning up after an error, so it raises none."""

    def close(self) -> None:
        """Give everything back."""
