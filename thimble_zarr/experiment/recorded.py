"""A run that `train` recorded: its settings, how far it is, and where it can resume."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from thimble_zarr.errors import ConfigError, ResumeError
from thimble_zarr.experiment.checkpoints import Checkpoints
from thimble_zarr.experiment.config import AUTO, TrainingConfig
from thimble_zarr.format.schema import Json
from thimble_zarr.store.contents import is_begun, read_declared
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.resume import check_has_every_step


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What the store of a run says of it; `attrs` is all that was kept with it.

    `committed_step` is -1 where not even the initial state is recorded for good. `is_finished` says
    that all steps were taken and the store is closed.
    """

    path: Path
    config: TrainingConfig
    memory_bytes: int
    attrs: Mapping[str, Json]
    committed_step: int
    block_steps: int
    is_finished: bool

    @classmethod
    def read(cls, store: StorePath) -> Self | None:
        """Return what a store says; None where there is none.

        A store without a committed step still has its settings, unless its writer was killed before
        it had written them. Raises ResumeError if something else than `train` recorded it, or a
        schedule left out steps.
        """
        if is_begun(store):
            reader = StoreReader.open_each(store)[0]
            check_has_every_step(reader)
            schema, n_rows, is_closed = reader.schema, reader.n_rows, reader.commit.complete
        elif (declared := read_declared(store)) is not None:
            schema, n_rows, is_closed = declared, 0, False
        else:
            return None
        attrs = schema.attrs
        settings, memory_bytes = attrs.get("config"), attrs.get("memory_bytes")
        try:
            if not isinstance(settings, Mapping) or type(memory_bytes) is not int:
                raise ConfigError("the store has no settings of it")
            # Version 0.1.0 recorded neither: it computed as the original notebook does.
            earlier = {"compute_dtype": settings.get("dtype"), "loss_chunk": 0}
            config = TrainingConfig.from_settings(earlier | {**settings})
        except ConfigError as error:
            raise ResumeError(
                f"cannot resume {store}: this version of `thimble-zarr train` did not record it "
                f"({error}); a loop of your own resumes with Recorder(..., resume=True)"
            ) from error
        return cls(
            path=Path(store),
            config=config,
            memory_bytes=memory_bytes,
            attrs=attrs,
            committed_step=n_rows - 1,
            block_steps=schema.layout.block_steps,
            is_finished=is_closed and n_rows > config.steps,
        )

    def check_same(self, config: TrainingConfig, attrs: Mapping[str, Json]) -> None:
        """Raise ResumeError, which names every difference, unless a run would be this one."""
        differences = [
            f"{name} {recorded.get(name)} recorded, {value} now"
            for recorded, now in ((self.config.to_json(), config.to_json()), (self.attrs, attrs))
            for name, value in now.items()
            if value != recorded.get(name)
        ]
        if differences:
            raise ResumeError(
                f"cannot resume {self.path}: {'; '.join(differences)}; leave these options out "
                "(the store has them), or record another run"
            )

    def resolve(self, config: TrainingConfig) -> TrainingConfig:
        """Return the config with the recorded compute dtype where it says `auto`."""
        if config.compute_dtype != AUTO:
            return config
        return replace(config, compute_dtype=self.config.compute_dtype)

    def check_resumable(self) -> None:
        """Raise what resuming would: another process is recording, or the checkpoint is lost."""
        if not self.is_finished:
            WriterLock(self.path).release()
            self.check_has(Checkpoints(self.path))

    def check_has(self, checkpoints: Checkpoints) -> None:
        """Raise ResumeError if there must have been a checkpoint of a recorded step."""
        is_there = any(step <= self.committed_step for step in checkpoints.steps())
        # One is taken as soon as a block is full, and that is before the block is committed.
        if not is_there and self.committed_step >= self.block_steps:
            raise ResumeError(
                f"cannot resume {self.path}: it has {self.committed_step} steps, but "
                f"{checkpoints.path} has no checkpoint of any; put the checkpoints back, or record "
                "again with --overwrite"
            )
