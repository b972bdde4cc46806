"""Choose what to record: parameters of a model, by name, by pattern, by module or by themselves."""

import datetime
import difflib
import fnmatch
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import thimble_zarr
from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import MAX_LISTED, ConfigError, OptimizerError, listed
from thimble_zarr.format.coding import CodingName
from thimble_zarr.format.layout import plan_layouts
from thimble_zarr.format.schema import (
    NOTEBOOK_FILE,
    SOURCE_FILE,
    Json,
    Schema,
    TokenLabels,
    check_group_name,
    chosen_variables,
    dims_of,
    row_size,
)
from thimble_zarr.format.stored_array import coding_of
from thimble_zarr.optim.base import Optimizer as OptimizerSpec
from thimble_zarr.record.capture import LiveOptimizer, dtype_name, optimizer_spec
from thimble_zarr.record.schedule import Schedule

Parameters = str | nn.Module | Mapping[str, Tensor] | Iterable[str | Tensor]
"""Patterns of names (`fnmatch`), a module, tensors by name, or tensors that a model names."""

Rows = Sequence[int] | Sequence[bool] | np.ndarray | Tensor
"""Ids of rows of a parameter, or whether each row is meant."""

Given = TypeVar("Given")

_SOFTWARE = {
    "thimble_zarr": thimble_zarr.__version__,
    "torch": torch.__version__,
    "zarr": importlib.metadata.version("zarr"),
    "python": platform.python_version(),
}

Labels = TokenLabels | Mapping[str, TokenLabels] | None
"""What is known of the tokens: of a single parameter, or by name of several."""


@dataclass(frozen=True, kw_only=True)
class RecordedParameter:
    """A parameter to record, of which only the `rows` of these ids, ascending, if any are given.

    `dtypes` are those of its variables.
    """

    tensor: Tensor
    optimizer: OptimizerSpec
    dtypes: Mapping[str, str]
    dims: tuple[str, ...]
    name: str | None = None
    labels: TokenLabels | None = None
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_recordable(self.tensor, self.name)
        if self.rows is not None and self.labels is not None:
            self.labels.check_length(len(self.tensor))
            object.__setattr__(self, "labels", self.labels.of(self.rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is recorded."""
        shape = tuple(self.tensor.shape)
        return shape if self.rows is None else (len(self.rows), *shape[1:])


def choose(
    optimizer: Optimizer,
    parameter: Tensor | None,
    *,
    parameters: Parameters | None = None,
    model: nn.Module | None = None,
    name: str | None = None,
    labels: Labels = None,
    tokens: Rows | Mapping[str, Rows] | None = None,
) -> tuple[LiveOptimizer, dict[str, RecordedParameter]]:
    """Return what to record, by its group in the store: the arguments are those of `Recorder`."""
    optimizer_spec(optimizer)  # before anything is asked of parameters
    if (parameter is None) == (parameters is None) or not (name is None or parameters is None):
        raise ConfigError(
            "expected either `parameter=`, one tensor, perhaps with its `name=`, or "
            "`parameters=`, which has its names in it; pass one of them"
        )
    if parameters is None:
        tensors = {"": _tensor(parameter, "given")}
        if name is None and model is not None:
            name = _first_names(model.named_parameters()).get(id(parameter))
    else:
        tensors = _named_tensors(optimizer, parameters, model)
    labels = _by_group(labels, "labels", tensors)
    rows: Mapping[str, Rows] = _by_group(tokens, "tokens", tensors)
    embeddings, has_tokens = _embeddings(model, parameters), {"", *labels}
    live = LiveOptimizer(optimizer, tensors)
    specs = live.specs()
    recorded: dict[str, RecordedParameter] = {}
    for group, tensor in tensors.items():
        known = group or name
        recorded[group] = RecordedParameter(
            tensor=tensor,
            optimizer=specs[group],
            dtypes=live.dtypes(group, specs[group]),
            dims=dims_of(tensor.shape, of_tokens=group in has_tokens or id(tensor) in embeddings),
            name=known,
            labels=labels.get(group),
            rows=_row_ids(rows[group], tensor, known or "the parameter") if group in rows else None,
        )
    return live, recorded


def _embeddings(*given: object) -> set[int]:
    """Return the identities of the weights of all embeddings in what is a module."""
    modules = (module.modules() for module in given if isinstance(module, nn.Module))
    return {id(one.weight) for one in chain(*modules) if isinstance(one, nn.Embedding)}


def declare(
    recorded: Mapping[str, RecordedParameter],
    *,
    variables: Sequence[str] | None,
    schedule: Schedule | None,
    attrs: Mapping[str, Json] | None,
    memory_bytes: int,
    coding: CodingName,
) -> dict[str, Schema]:
    """Return the schema of each parameter; the arguments are those of `Recorder`."""
    dtypes = {
        group: {name: one.dtypes[name] for name in chosen_variables(one.optimizer, variables)}
        for group, one in recorded.items()
    }
    codings = {
        group: coding_of(coding, one.optimizer, dtypes[group]) for group, one in recorded.items()
    }
    rows = [row_size(one.shape, dtypes[group], codings[group]) for group, one in recorded.items()]
    layouts = plan_layouts(rows, memory_bytes=memory_bytes)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        group: Schema(
            shape=one.shape,
            dims=one.dims,
            dtypes=dtypes[group],
            layout=layout,
            optimizer=one.optimizer,
            coding=codings[group],
            parameter=one.name,
            device=str(one.tensor.device),
            n_threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            contiguous=one.tensor.is_contiguous(),
            whole_tokens=None if one.rows is None else len(one.tensor),
            schedule=None if schedule is None else str(schedule),
            software=_SOFTWARE,
            created=created,
            attrs=_checked_attrs(attrs or {}),
        ).labelled(one.labels)
        for (group, one), layout in zip(recorded.items(), layouts, strict=True)
    }


def _checked_attrs(attrs: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return attributes; raise ConfigError if they say of a run that it was imported."""
    if taken := sorted({NOTEBOOK_FILE, SOURCE_FILE} & {*attrs}):
        raise ConfigError(
            f"attrs has {listed(taken)}, by which a run is known that was imported; choose another "
            "name"
        )
    return attrs


def _by_group(
    given: Given | Mapping[str, Given] | None, what: str, recorded: Collection[str]
) -> Mapping[str, Given]:
    """Return what was given of a single parameter, or of several by name."""
    if given is None:
        return {}
    if isinstance(given, Mapping) == ("" in recorded):
        raise ConfigError(
            f"{what} of the one `parameter=` are given as they are, those of several "
            f'`parameters=` by name: {what}={{"wte.weight": {what}}}'
        )
    by_group = given if isinstance(given, Mapping) else {"": given}
    if unknown := [name for name in by_group if name not in recorded]:
        raise ConfigError(
            f"{what} were given for {unknown[0]}, which is not recorded; recorded are "
            f"{listed(recorded)}"
        )
    return by_group


def _row_ids(tokens: Rows, tensor: Tensor, name: str) -> np.ndarray | None:
    """Return rows as ids, ascending, each once; None if they are all."""
    given = tokens.numpy(force=True) if isinstance(tokens, Tensor) else np.asarray(tokens)
    if not tensor.ndim:
        raise ConfigError(f"{name} is a single number and has no rows to choose among")
    n_rows = len(tensor)
    if given.dtype == bool and given.shape != (n_rows,):
        raise ConfigError(
            f"{name} has {n_rows} rows, and the mask of its tokens has shape {given.shape}; "
            "give one value for each row"
        )
    ids = np.flatnonzero(given) if given.dtype == bool else np.unique(given)
    if not (given.ndim == 1 and len(ids) and np.issubdtype(ids.dtype, np.integer)):
        raise ConfigError(
            f"the tokens of {name} are {given.size} values of {given.dtype}; expected at least "
            "one id, or a mask of all rows"
        )
    for wrong in (ids[0], ids[-1]):
        if not 0 <= wrong < n_rows:
            raise ConfigError(f"{name} has rows 0 to {n_rows - 1}, and {wrong} was chosen")
    return ids.astype(np.int64) if len(ids) < n_rows else None


def _check_recordable(tensor: Tensor, name: str | None) -> None:
    """Raise OptimizerError unless it is one whole tensor in memory that trains and can be kept."""
    kind, native = type(tensor).__name__, dtype_name(tensor)
    if is_traceable_wrapper_subclass(tensor) or kind == "FlatParameter":
        raise OptimizerError(
            f"the parameter is a {kind}, of which this process holds a part or another form (FSDP, "
            "tensor parallelism, quantization); only whole, plain tensors can be recorded"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise OptimizerError(
            f"the parameter has no plain memory: its layout is {tensor.layout}, on "
            f"{tensor.device}; make the recorder when the model has its weights"
        )
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        raise OptimizerError(
            "the parameter is frozen (requires_grad is False), so no step will change it; choose "
            "one that trains, or unfreeze it before the recorder is made"
        )
    if tensor.numel() == 0 or native not in NATIVE_DTYPES:
        raise OptimizerError(
            f"the parameter {name or 'given'} is {native} of shape {tuple(tensor.shape)}; a "
            f"recording needs at least one element, in one of {', '.join(NATIVE_DTYPES)}"
        )


def _named_tensors(
    optimizer: Optimizer, parameters: Parameters, model: nn.Module | None
) -> dict[str, Tensor]:
    """Return what was chosen, with names, in order: tied weights have their first name."""
    found: list[tuple[str, Tensor]] = []
    items: Iterable[object] = ()
    if isinstance(parameters, Mapping):
        found = [(name, _tensor(value, name)) for name, value in parameters.items()]
    elif isinstance(parameters, nn.Module):
        model = model or parameters
        items = [tensor for tensor in parameters.parameters() if tensor.requires_grad]
    else:
        items = [parameters] if isinstance(parameters, str | Tensor) else parameters
    if model is not None:
        known = [*model.named_parameters(remove_duplicate=False)]
    else:  # what the optimizer was made with may have names
        known = [
            named
            for group in optimizer.param_groups
            for named in zip(group.get("param_names", ()), group["params"], strict=False)
        ]
    names = _first_names(known)
    for item in items:
        if isinstance(item, str):
            found += [(names[id(tensor)], tensor) for tensor in _matching(item, known)]
        elif (name := names.get(id(tensor := _tensor(item, "given")))) is not None:
            found.append((name, tensor))
        else:
            raise ConfigError(
                f"the parameter of shape {tuple(tensor.shape)} has no name here; pass the "
                '`model=` that has it, or name it yourself with parameters={"name": tensor}'
            )
    if not found:
        raise ConfigError("no parameter was chosen: `parameters=` is empty")
    first = _first_names(found)
    named = {name: tensor for name, tensor in found if first[id(tensor)] == name}
    for name in named:
        check_group_name(name)
    return named


def _first_names(named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """Return the first name of every tensor, by its identity."""
    return {id(tensor): name for name, tensor in reversed([*named])}


def _matching(pattern: str, named: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    known = dict(named)
    if not known:
        raise ConfigError(
            f"no parameter here has a name that {pattern!r} could match; pass `model=` too"
        )
    matching = {name: known[name] for name in known if fnmatch.fnmatchcase(name, pattern)}
    trainable = [tensor for tensor in matching.values() if tensor.requires_grad]
    if matching and not trainable:
        raise ConfigError(
            f"{pattern!r} matches only parameters that are not trained (requires_grad is False): "
            f"{listed(matching)}"
        )
    if not matching:
        close = difflib.get_close_matches(pattern, known, n=MAX_LISTED, cutoff=0.4)
        there_are = f"there {'is' if len(known) == 1 else 'are'} {listed(known)}"
        if close and len(known) > MAX_LISTED:
            there_are = f"of {len(known)} names the nearest are {listed(close)}"
        raise ConfigError(f"no parameter is named {pattern!r}; {there_are}")
    return trainable


def _tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise OptimizerError(
            f"the parameter {name} is a {type(value).__name__}; pass its tensor, for example "
            "`embedding.weight`, or with `parameters=` the pattern of its name"
        )
    return value
