"""A parameter in checkpoints at several steps, as a record of these steps."""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import ConfigError, NotAStoreError, SelectionError, listed
from thimble_zarr.format.layout import plan_layout
from thimble_zarr.format.schema import SOURCE_FILE, Schema, TokenLabels, dims_of
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.sources.containers.array import named_errors
from thimble_zarr.sources.containers.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from thimble_zarr.sources.importing import ByteCount, Progress, check_apart, write_store
from thimble_zarr.store.contents import check_vacant
from thimble_zarr.store.reader import StorePath, StoreReader

_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """A parameter at one step: a checkpoint, and what our variables are called in it."""

    step: int
    checkpoint: Checkpoint
    names: Mapping[str, str]

    def info(self, variable: str) -> TensorInfo:
        """Return shape and dtype of a variable."""
        return self.checkpoint.tensors[self.names[variable]]

    def read(self, variable: str) -> np.ndarray:
        """Read a variable, as its bits, in the shape of the parameter."""
        with named_errors(self.checkpoint.path):
            return self.checkpoint.read(self.names[variable])


def open_checkpoints(paths: Sequence[Path], parameter: str) -> list[Snapshot]:
    """Open a parameter in checkpoints, in the order of their steps.

    Parameters
    ----------
    paths
        Safetensors files, directories of such files, or distributed checkpoints. The step of each
        is the last number in its name, or else in the name of its directory.
    parameter
        The name of the parameter in the model, such as `wte.weight`, or the end of it.

    Raises
    ------
    SelectionError
        If a checkpoint does not have it, or several that are called so.
    ConfigError
        If two are of one step, or no step is in a name; or if the tensors differ in shape or dtype.
    StoreError
        If one is no checkpoint, is damaged, or cannot be read.
    """
    found = []
    for path in paths:
        with named_errors(path):
            checkpoint = open_checkpoint(path.absolute())
        found.append(Snapshot(_step(path), checkpoint, _names(checkpoint, parameter)))
    found.sort(key=lambda of: of.step)
    for before, after in itertools.pairwise(found):
        if before.step == after.step:
            raise ConfigError(
                f"{before.checkpoint.path} and {after.checkpoint.path} are both of step "
                f"{after.step:,}; the step is the last number in a name"
            )
    for snapshot in found:
        for variable in snapshot.names:
            _check_alike(snapshot, found, variable)
    return found


def _step(path: Path) -> int:
    for name in (path.name.removesuffix(".safetensors"), path.absolute().parent.name):
        if numbers := re.findall(r"\d+", re.sub(r"\d+-of-\d+", "", name)):
            return int(numbers[-1])
    raise ConfigError(
        f"neither {path} nor its directory has a step in its name, such as step_500.safetensors or "
        "checkpoint-500/model.safetensors"
    )


def _names(checkpoint: Checkpoint, parameter: str) -> dict[str, str]:
    """Return what the parameter and its states are called in a checkpoint."""
    states = {state: _ending(checkpoint, f"{parameter}.{state}") for state in _STATES}
    weights = _ending(checkpoint, parameter)
    for variable, names in {"W": weights, **states}.items():
        if len(names) > 1:
            raise SelectionError(
                f"{checkpoint.path} has {listed(names)}, which all end with {parameter}; name one "
                f"of them ({variable} is looked for)"
            )
    if not weights:
        floats = (name for name, of in checkpoint.tensors.items() if of.native and of.shape)
        raise SelectionError(
            f"{checkpoint.path} has no parameter {parameter}; there is {listed(floats, most=24)}"
        )
    return {"W": weights[0]} | {state: names[0] for state, names in states.items() if names}


def _ending(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the floating-point tensors of a name, or those that end with it."""
    floats = [known for known, of in checkpoint.tensors.items() if of.native is not None]
    return [name] if name in floats else [known for known in floats if known.endswith(f".{name}")]


def _check_alike(snapshot: Snapshot, every: Sequence[Snapshot], variable: str) -> None:
    first = next(of for of in every if variable in of.names)
    found, expected = snapshot.info(variable), first.info(variable)
    if found != expected or found.shape != every[0].info("W").shape:
        raise ConfigError(
            f"{snapshot.names[variable]} of {snapshot.checkpoint.path} is {found.native} of shape "
            f"{found.shape}, and {first.names[variable]} of {first.checkpoint.path} is "
            f"{expected.native} of shape {expected.shape}"
        )


def import_checkpoints(
    paths: Sequence[Path],
    path: StorePath,
    *,
    parameter: str,
    labels: TokenLabels | None = None,
    overwrite: bool = False,
    on_progress: Progress = lambda n_done, n_total: None,
) -> StoreReader:
    """Make a store of a parameter in checkpoints: weights, and AdamW's states where saved.

    It has a row for each checkpoint. One row is in memory at a time, or as many as fit a block.
    Raises as `open_checkpoints` does, and StoreExistsError or StoreError if the store cannot be
    created or written.

    Examples
    --------
    >>> from pathlib import Path
    >>> files = sorted(Path("checkpoints").glob("*.safetensors"))
    >>> import_checkpoints(files, "run.zarr", parameter="wte.weight").read_steps()  # doctest: +SKIP
    array([100, 200, 300])
    """
    check_vacant(path, overwrite=overwrite)
    check_apart(paths, path)
    snapshots = open_checkpoints(paths, parameter)
    schema = _schema(snapshots, parameter)
    steps = np.array([of.step for of in snapshots])
    scalars = {name: np.full(len(steps), np.nan) for name in schema.scalars}
    n_bytes = schema.row_bytes * len(steps)
    write_store(
        path,
        schema.labelled(labels),
        n_rows=len(steps),
        scalars=scalars,
        read=lambda rows: _rows(snapshots[slice(*rows)], schema),
        count=ByteCount(n_bytes, on_progress),
        labels=labels,
        steps=steps,
        overwrite=overwrite,
    )
    return StoreReader.open(path)


def _rows(snapshots: Sequence[Snapshot], schema: Schema) -> dict[str, np.ndarray]:
    """Return rows of each variable; missing where a checkpoint does not have it."""
    rows = {}
    for name, native in schema.dtypes.items():
        shape = (len(snapshots), schema.n_tokens, schema.n_dims)
        rows[name] = np.full(shape, fill_value(native), storage_dtype(native))
        for row, snapshot in enumerate(snapshots):
            if name in snapshot.names:
                rows[name][row] = snapshot.read(name).reshape(shape[1:])
    return rows


def _schema(snapshots: Sequence[Snapshot], parameter: str) -> Schema:
    if not snapshots:
        raise NotAStoreError("no checkpoint was named")
    dtypes = {
        name: str(next(of for of in snapshots if name in of.names).info(name).native)
        for name in ("W", *_STATES)
        if any(name in of.names for of in snapshots)
    }
    shape = snapshots[0].info("W").shape
    steps = [of.step for of in snapshots]
    newest = max(of.checkpoint.path.stat().st_mtime for of in snapshots)
    schema = Schema(
        shape=shape,
        dims=dims_of(shape, of_tokens=True),
        dtypes=dtypes,
        layout=plan_layout(1, 1, {"W": 1}),
        optimizer=Adam(name="AdamW", implementation="single", decoupled_weight_decay=True),
        parameter=parameter,
        device="unknown",
        schedule=None if steps == [*range(len(steps))] else "checkpoints",
        created=datetime.datetime.fromtimestamp(newest, datetime.UTC).isoformat(timespec="seconds"),
        attrs={SOURCE_FILE: {"layout": "checkpoints", "n_checkpoints": len(steps)}},
    )
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    return replace(schema, layout=plan_layout(schema.n_tokens, schema.n_dims, itemsizes))
