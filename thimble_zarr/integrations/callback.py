"""What the callbacks of trainers have in common: a recorder, opened and closed with training."""

from typing import Any, Self

import torch
from torch import nn

from thimble_zarr.errors import OptimizerError
from thimble_zarr.record.parameters import Parameters
from thimble_zarr.record.recorder import Recorder
from thimble_zarr.store.reader import StorePath


class RecordingCallback:
    """Keeps what a recorder is made of until training begins: the options of `Recorder`."""

    def __init__(self, path: StorePath, *, parameters: Parameters, **options: Any) -> None:
        self._path = path
        self._options: dict[str, Any] = {"parameters": parameters, **options}
        self._recorder: Recorder | None = None

    def _open(self, optimizer: object, model: nn.Module, **options: Any) -> Recorder:
        options |= self._options
        self._recorder = Recorder(self._path, torch_optimizer(optimizer), model=model, **options)
        return self._recorder

    def on_train_end(self, *others: object, **given: object) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Commit what was recorded and close the store. Safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(kind, error, traceback)


def torch_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return torch's optimizer, out of any wrappers: it alone calls the hooks of its steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"a {type(optimizer).__name__} is no optimizer of torch")
    return optimizer
