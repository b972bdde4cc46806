"""Rows from a CUDA device, copied while training goes on.

The training thread never waits for the device. After a step its stream copies every tensor to a
place of its own there (one row in all), and a second stream carries them into pinned memory, so
training may change them at once. Its stream waits only where the row before is still on its way.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor


class SideStream:
    """Copies rows of tensors on a device into memory, one row after the other.

    `cuda` is `torch.cuda`. Memory that is not `pinned` (page-locked) makes CUDA wait.
    """

    def __init__(self, device: str, cuda: ModuleType, *, pinned: bool = True) -> None:
        self._device, self._cuda, self._pinned = device, cuda, pinned
        self._stream: torch.cuda.Stream = cuda.Stream(device)
        self._staged: dict[str, Tensor] = {}
        self._sending: list[tuple[Tensor, Tensor]] = []
        self._sent: torch.cuda.Event | None = None

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """Return memory that rows can be copied to."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def start(self) -> None:
        """Begin a row. What is staged may be overwritten once the row before has left."""
        self._sending.clear()
        if self._sent is not None:
            self._cuda.current_stream(self._device).wait_event(self._sent)

    def stage(self, name: str, row: Tensor, tensor: Tensor, rows: Tensor | None = None) -> None:
        """Take a tensor, or some rows of it, to be copied to `row`; a name has one of its own."""
        if name not in self._staged:
            self._staged[name] = torch.empty_like(row, device=self._device, pin_memory=False)
        if rows is None:
            self._staged[name].copy_(tensor)
        else:
            torch.index_select(tensor.detach(), 0, rows, out=self._staged[name])
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
    return SideStream(device, torch.cuda) if device.startswith("cuda") else None
