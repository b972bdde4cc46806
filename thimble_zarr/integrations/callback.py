"""What the callbacks of trainers have in common: a recorder, opened and closed with training."""

from typing import Any

import torch
from torch import nn

from thimble_zarr.errors import OptimizerError
from thimble_zarr.record.parameters import Parameters
from thimble_zarr.record.recorder import Recorder
from thimble_zarr.store.reader import StorePath


class RecordingCallback:
    """Keeps what a recorder is made of until training begins."""

    def __init__(self, path: StorePath, *, parameters: Parameters, **options: Any) -> None:
        self._path = path
        self._options: dict[str, Any] = {"parameters": parameters, **options}
        self._recorder: Recorder | None = None

    def _open(self, optimizer: object, model: nn.Module, **options: Any) -> Recorder:
        options |= self._options
        self._recorder = Recorder(self._path, torch_optimizer(optimizer), model=model, **options)
        return self._recorder

    def close(self) -> None:
        """Commit what was recorded and close the store. Safe to call twice."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return torch's optimizer, out of any wrappers: it alone calls the hooks of its steps.

    Raises
    ------
    OptimizerError
        If there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"a {type(optimizer).__name__} is no optimizer of torch")
    return optimizer
