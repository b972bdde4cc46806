"""Record what a `transformers.Trainer` does."""

from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from thimble_zarr.integrations.callback import RecordingCallback


class ThimbleCallback(RecordingCallback, TrainerCallback):  # type: ignore[misc]
    """Record every optimizer step of a Trainer, from the start of training to its end.

    The loss of a step is recorded where the Trainer reports it: with `logging_steps=1` at each. A
    mean over several steps is no step's loss and is left out. Of several processes the first
    records. All options are as `Recorder` takes them, such as `parameters="*.wte.weight"`.

    The Trainer tells its callbacks nothing of an error. After one the recording is closed by
    `close`, by the next training, when Python ends, or at once where it is a `with` block::

        with ThimbleCallback("run.zarr", parameters="*.wte.weight") as recording:
            Trainer(..., callbacks=[recording]).train()
    """

    _step_of_loss = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *others: object, **given: Any
    ) -> None:
        """Open the store: by now the Trainer has made and wrapped its optimizer."""
        self.close()
        self._step_of_loss = state.global_step
        if state.is_world_process_zero:
            n_steps = state.max_steps - state.global_step
            self._open(given["optimizer"], given["model"], n_steps=n_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *others: object, **given: Any
    ) -> None:
        """Note the loss, if it is of one step."""
        if self._recorder is not None and "loss" in given["logs"]:
            if state.global_step == self._step_of_loss + 1:
                self._recorder.log(loss=given["logs"]["loss"], step=self._recorder.step)
            self._step_of_loss = state.global_step
