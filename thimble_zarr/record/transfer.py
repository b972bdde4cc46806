"""Rows from a CUDA device, copied while training goes on.

Nothing here makes the training thread wait for the device. When a step is done, its stream copies
every tensor to a place of its own on the device, which takes as long as reading it once; a second
stream carries them from there into pinned memory. So training may change weights, states and
gradients at once, in whatever way. The stream of training waits, on the device, only where the row
before is still on its way. It costs the memory of one row on the device.

The order of events is tested with streams that do everything as late as they may. How long it takes
was never measured.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor


class DeviceEvent(Protocol):
    """A mark in a stream."""

    def synchronize(self) -> None:
        """Wait, in the calling thread, until the stream has come to the mark."""


class DeviceStream(Protocol):
    """What a device does one after the other."""

    def wait_event(self, event: DeviceEvent) -> None:
        """Let what comes next in this stream wait for a mark in another."""

    def wait_stream(self, stream: "DeviceStream") -> None:
        """Let what comes next wait for all that is in another stream now."""

    def record_event(self) -> DeviceEvent:
        """Set a mark."""


class Cuda(Protocol):
    """The part of `torch.cuda` that is needed."""

    def Stream(self, device: str) -> DeviceStream:
        """Make a stream."""

    def current_stream(self, device: str) -> DeviceStream:
        """Return the stream that training uses."""

    def stream(self, stream: DeviceStream) -> AbstractContextManager[object]:
        """Put what is done within the block into a stream."""


class SideStream:
    """Copies rows of tensors on a device into memory, one row after the other.

    Parameters
    ----------
    device
        Where the tensors are, as torch names it.
    cuda
        `torch.cuda`, or what does as it does.
    pinned
        Whether the memory that rows are copied to is page-locked, without which CUDA waits.
    """

    def __init__(self, device: str, cuda: Cuda, *, pinned: bool = True) -> None:
        self._device = device
        self._cuda = cuda
        self._pinned = pinned
        self._stream = cuda.Stream(device)
        self._staged: dict[str, Tensor] = {}
        self._sending: list[tuple[Tensor, Tensor]] = []
        self._sent: DeviceEvent | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory that rows can be copied to."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def start(self) -> None:
        """Begin a row. What is staged may be overwritten once the row before has left."""
        self._sending.clear()
        if self._sent is not None:
            self._cuda.current_stream(self._device).wait_event(self._sent)

    def stage(self, name: str, row: Tensor, tensor: Tensor, chosen: Tensor | None = None) -> None:
        """Take a tensor, always the same by name, that is to be copied to `row`.

        Where only some of its rows are chosen, by their indices on the device, it takes no others.
        """
        if name not in self._staged:
            self._staged[name] = torch.empty_like(row, device=self._device, pin_memory=False)
        if chosen is None:
            self._staged[name].copy_(tensor)
        else:
            torch.index_select(tensor.detach(), 0, chosen, out=self._staged[name])
        self._sending.append((row, self._staged[name]))

    def send(self) -> Callable[[], None]:
        """Send the row on its way; return what waits until it, and all before, have arrived."""
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            for row, staged in self._sending:
                row.copy_(staged, non_blocking=True)
        self._sent = self._stream.record_event()
        return self._sent.synchronize


def side_stream(device: str) -> SideStream | None:
    """Return what copies rows from a device, None where plain copies do: from the CPU and MPS."""
    return SideStream(device, cast("Cuda", torch.cuda)) if device.startswith("cuda") else None
