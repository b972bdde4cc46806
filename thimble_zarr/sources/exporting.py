"""A recording written as the file that the first notebook saves, in bounded memory.

What a store has no place for is kept in its attribute `notebook_file`, so that a file that was
imported can be written again, byte for byte.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, DamagedStoreError, StoreExistsError
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.reader import Reader, not_begun
from thimble_zarr.format.schema import NOTEBOOK_FILE
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.sources.containers.safetensors import DTYPES, Tensor, header_bytes, read_header
from thimble_zarr.sources.importing import ByteCount, Progress, all_or_nothing
from thimble_zarr.sources.layouts.notebook_attribute import (
    CONFIG,
    FILE_NAMES,
    FLOAT_SCALARS,
    HYPERPARAMETERS,
    LOSSES,
    STATES,
    NotebookLayout,
)


def export_notebook(
    reader: Reader,
    file: Path,
    *,
    overwrite: bool = False,
    on_progress: Progress = lambda n_done, n_total: None,
) -> None:
    """Write a recording as the original notebook would have saved it.

    A store that was imported becomes the file it came from, byte for byte if safetensors wrote that
    file. A failure leaves no file. `on_progress` is called as bytes are written.

    Raises
    ------
    ConfigError
        If the notebook's file cannot hold the run without loss: it is not bfloat16, or its
        hyper-parameters changed.
    StoreExistsError, DamagedStoreError, StoreError
        If the file exists, the store cannot be read, or the file cannot be written.
    """
    file = file.absolute()
    _check_file_vacant(file, overwrite=overwrite)
    if reader.n_rows == 0:
        raise not_begun(reader)
    attribute = reader.schema.attrs.get(NOTEBOOK_FILE)
    layout = _as_notebook(reader) if attribute is None else NotebookLayout.from_attribute(attribute)
    layout.check_all_kept()
    shape = (reader.n_rows, reader.schema.n_tokens, reader.schema.n_dims)
    tensors = dict(layout.tensors)
    for name in (*FILE_NAMES.values(), LOSSES):
        tensors[name] = replace(tensors[name], shape=shape[:1] if name == LOSSES else shape)
    count = ByteCount(sum(tensor.n_bytes for tensor in tensors.values()), on_progress)
    partial = file.with_name(f"{file.name}.partial")
    with all_or_nothing(file, lambda: partial.unlink(missing_ok=True)):
        with partial.open("wb") as stream:
            stream.write(header_bytes(tensors, layout.metadata))
            for name, tensor in tensors.items():
                for part in _parts(reader, name, tensor, layout.kept):
                    stream.write(part)
                    count.add(len(part))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)


def _check_file_vacant(file: Path, *, overwrite: bool) -> None:
    if not file.exists():
        return
    if not overwrite:
        raise StoreExistsError(
            f"{file} exists; choose another name, or overwrite it (--overwrite, or overwrite=True)"
        )
    try:
        read_header(file)
    except DamagedStoreError:
        pass  # a safetensors file that was cut off is no loss
    except OSError as error:
        raise StoreExistsError(
            f"{file} exists and is not a safetensors file, so it is never overwritten; choose "
            "another name"
        ) from error


def _as_notebook(reader: Reader) -> NotebookLayout:
    """Return what the notebook would have saved beside the rows, in safetensors' order."""
    if obstacle := next(_obstacles(reader), ""):
        raise ConfigError(f"{reader.path} {obstacle}")
    scalars = _scalars(reader)
    dtypes = {name: "F32" if name in FLOAT_SCALARS else "I64" for name in scalars}
    dtypes |= {LOSSES: "F32"} | dict.fromkeys(FILE_NAMES.values(), "BF16")
    dtypes |= {FILE_NAMES[name]: "F32" for name in STATES}
    by_size = [*DTYPES]
    names = sorted(dtypes, key=lambda name: (by_size.index(dtypes[name]), name))
    return NotebookLayout(
        {name: Tensor(dtypes[name], ()) for name in names},
        {name: np.array(scalars[name], DTYPES[dtypes[name]]).tobytes() for name in scalars},
    )


def _obstacles(reader: Reader) -> Iterator[str]:
    """Yield what the notebook's file has no place for."""
    schema, scalars = reader.schema, reader.read_scalars()
    if len(schema.shape) != 2:
        yield (
            f"holds a parameter of shape {schema.shape}, and the notebook's file an embedding of "
            "shape (token, dim) only"
        )
    if not isinstance(schema.optimizer, Adam):
        yield f"was trained with {schema.optimizer.name}, and the notebook's file is of AdamW"
        return  # of others it is not known what more they have
    missing = ", ".join(name for name in FILE_NAMES if name not in schema.dtypes)
    chosen = [f"no {missing}"] if missing else []
    chosen += ["only some of its tokens"] if schema.whole_tokens is not None else []
    chosen += ["only some of its steps"] if schema.schedule is not None else []
    if chosen:
        yield (
            f"has {' and '.join(chosen)}, and the notebook's file needs all of a run; export one "
            "that was recorded whole"
        )
    if set(schema.dtypes.values()) != {"bfloat16"}:
        yield (
            f"holds {schema.dtypes['W']}, and the notebook's file bfloat16 weights only; a copy "
            "would lose precision"
        )
    lost = [name for name in (*schema.dtypes, *schema.logged) if name not in FILE_NAMES]
    lost += [name for name in HYPERPARAMETERS if len(np.unique(scalars[name][1:])) > 1]
    if not np.array_equal(scalars["optimizer_step"], np.arange(reader.n_rows)):
        lost.append("optimizer_step")
    if lost:
        yield (
            f"has {', '.join(lost)} by step, for which the notebook's file has no place; a copy "
            "would not be the same run"
        )
    if not schema.optimizer.decoupled_weight_decay and scalars["weight_decay"][1:].any():
        yield (
            "was trained with L2 decay, and the notebook's file is of AdamW, whose decay is "
            "decoupled; a copy would not be the same run"
        )


def _scalars(reader: Reader) -> dict[str, float]:
    schema, labels, recorded = reader.schema, reader.read_labels(), reader.read_scalars()
    config = schema.attrs.get("config")
    scalars: dict[str, float] = {}
    for name, key in CONFIG.items():
        value = config.get(key) if isinstance(config, Mapping) else None
        if isinstance(value, float if name in FLOAT_SCALARS else int):
            scalars[name] = value
    if reader.n_rows > 1:
        scalars |= {name: recorded[ours][1] for ours, name in HYPERPARAMETERS.items()}
    sizes = schema.n_tokens, schema.n_dims, reader.n_rows - 1
    scalars |= zip(("vocab_size", "hidden_dim", "num_steps"), sizes, strict=True)
    if labels.live is not None:
        n_live = int(labels.live.sum())
        scalars |= {"n_live": n_live, "n_dead": schema.n_tokens - n_live}
    return scalars


def _parts(
    reader: Reader, name: str, tensor: Tensor, kept: Mapping[str, bytes]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor of the file, a few rows at a time."""
    if name in kept:
        yield kept[name]
        return
    if name == LOSSES:
        losses, is_narrow = reader.read_scalars()["loss"], tensor.dtype == "BF16"
        with np.errstate(over="ignore"):  # one beyond float32 is infinite there
            found = losses.astype("<f4" if is_narrow else DTYPES[tensor.dtype])
        # Of bfloat16 it is the upper half of float32.
        yield (found.view("<u2")[1::2] if is_narrow else found).tobytes()
        return
    (variable,) = (ours for ours, theirs in FILE_NAMES.items() if theirs == name)
    for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
        bits = reader.read(variable, rows)
        if variable == "grad" and rows[0] == 0:
            bits[0] = 0
        for row in bits:
            if tensor.dtype == "F32" and row.dtype == np.uint16:
                row = decode(row, "bfloat16")
            yield row.astype(DTYPES[tensor.dtype], copy=False).reshape(-1).view(np.uint8).data
