"""Record what a Lightning `Trainer` does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thimble_zarr.errors import ConfigError
from thimble_zarr.integrations.callback import RecordingCallback
from thimble_zarr.store.reader import StorePath

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer


class ThimbleCallback(RecordingCallback, Callback):  # type: ignore[misc]
    """Record every optimizer step of a Trainer, from the start of training to its end or error.

    The loss of a step is the mean over the batches that it accumulates. Of several processes the
    first records. `optimizer` says which one to record, where the module configures several; all
    other options are as `Recorder` takes them, such as `parameters="*.wte.weight"`.
    """

    def __init__(self, path: StorePath, *, optimizer: int = 0, **options: Any) -> None:
        super().__init__(path, **options)
        self._optimizer = optimizer
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store: by now the optimizers are there."""
        self.close()
        self._losses, self._global_step = [], trainer.global_step
        if not trainer.is_global_zero:
            return
        if self._optimizer >= len(trainer.optimizers):
            raise ConfigError(
                f"optimizer={self._optimizer}, but the module configures "
                f"{len(trainer.optimizers)}, counted from 0"
            )
        self._step = self._open(trainer.optimizers[self._optimizer], pl_module).step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        *batch: object,
    ) -> None:
        """Note the loss when a step was taken."""
        if self._recorder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._global_step:
            return  # gradients are accumulated
        self._global_step, losses, self._losses = trainer.global_step, self._losses, []
        taken, self._step = self._recorder.step > self._step, self._recorder.step
        if taken and losses:  # and not skipped, as Lightning does not know
            self._recorder.log(loss=torch.stack(losses).mean(), step=self._step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the store, with all steps before the error."""
        self.__exit__(type(exception), exception, None)
