"""Choose what to record: parameters of a model, by name, by pattern, by module or by themselves."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from thimble_zarr.errors import ConfigError, OptimizerError
from thimble_zarr.format.schema import TokenLabels, check_group_name, dims_of
from thimble_zarr.record.capture import check_parameter, dtype_name

RECORDABLE = ("bfloat16", "float16", "float32", "float64")
"""Dtypes of parameters. Where epsilon underflows, as 1e-8 does in float16, rounding may do anything
to AdamW's formula; the replay is exact all the same."""

Parameters = str | nn.Module | Mapping[str, Tensor] | Iterable[str | Tensor]
"""Patterns of names (`fnmatch`), a module, tensors by name, or tensors that a model names."""

Rows = Sequence[int] | Sequence[bool] | np.ndarray | Tensor
"""Ids of rows of a parameter, or whether each row is meant."""

_MOST_NAMED = 8
"""Names that an error lists."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A parameter to record.

    Attributes
    ----------
    tensor
        The parameter.
    dims
        What its axes are called.
    name
        Its name; None where nobody said.
    labels
        What is known of its tokens.
    rows
        Which rows are recorded, ascending, int64. None where all are.
    """

    tensor: Tensor
    dims: tuple[str, ...]
    name: str | None = None
    labels: TokenLabels | None = None
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is recorded."""
        shape = tuple(self.tensor.shape)
        return shape if self.rows is None else (len(self.rows), *shape[1:])


def choose_parameter(
    parameter: Tensor,
    *,
    name: str | None,
    model: nn.Module | None,
    labels: TokenLabels | Mapping[str, TokenLabels] | None,
) -> dict[str, Chosen]:
    """Return the one parameter of a store, by its group: the root, whose name is empty.

    Raises
    ------
    OptimizerError
        If it is not a tensor.
    ConfigError
        If there are labels by name.
    """
    if not isinstance(parameter, Tensor):
        raise OptimizerError(
            f"the parameter is a {type(parameter).__name__}; pass its tensor, for example "
            "`embedding.weight`, or choose several with `parameters=`"
        )
    if not isinstance(labels, TokenLabels | None):
        raise ConfigError("labels by name are for `parameters=`; give the TokenLabels themselves")
    if name is None and model is not None:
        name = _names(model).get(id(parameter))
    dims = dims_of(parameter.shape, of_tokens=True)
    return {"": Chosen(tensor=parameter, dims=dims, name=name, labels=labels)}


def choose_parameters(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    *,
    model: nn.Module | None,
    labels: TokenLabels | Mapping[str, TokenLabels] | None,
) -> dict[str, Chosen]:
    """Return parameters to record, by name, each once.

    A tensor that has several names, as tied weights do, is recorded by the first. Patterns and
    modules choose trainable parameters only. The weight of a `torch.nn.Embedding`, and whatever has
    labels, has dims `(token, dim)`; any other matrix has `(row, col)`.

    Parameters
    ----------
    optimizer
        What trains them.
    parameters
        Patterns of names, a module, tensors by name, or tensors that the model or the optimizer
        has names for.
    model
        What names the parameters and knows its embeddings.
    labels
        By name, what is known of the tokens of an embedding.

    Raises
    ------
    ConfigError
        If nothing is chosen, a pattern matches nothing, a name cannot be that of a group, or there
        are labels of something else.
    OptimizerError
        If something chosen is not a tensor.
    """
    if isinstance(labels, TokenLabels):
        raise ConfigError(
            'labels of several parameters are given by name: labels={"wte.weight": labels}'
        )
    named = _once(_named_tensors(optimizer, parameters, model))
    if not named:
        raise ConfigError("no parameter was chosen: `parameters=` is empty")
    for name in named:
        check_group_name(name)
    labels = labels or {}
    if unknown := [name for name in labels if name not in named]:
        raise ConfigError(
            f"labels were given for {unknown[0]}, which is not recorded; recorded are "
            f"{_listed(named)}"
        )
    modules = [module for module in (model, parameters) if isinstance(module, nn.Module)]
    embeddings = {
        id(layer.weight)
        for module in modules
        for layer in module.modules()
        if isinstance(layer, nn.Embedding)
    }
    return {
        name: Chosen(
            tensor=tensor,
            dims=dims_of(tensor.shape, of_tokens=name in labels or id(tensor) in embeddings),
            name=name,
            labels=labels.get(name),
        )
        for name, tensor in named.items()
    }


def choose_rows(
    chosen: Mapping[str, Chosen], tokens: Rows | Mapping[str, Rows] | None
) -> dict[str, Chosen]:
    """Return parameters of which only some rows are recorded, with the labels of those.

    Parameters
    ----------
    chosen
        Parameters, by group.
    tokens
        Ids of rows, or a mask of all rows: of a single parameter, or by name of several.

    Raises
    ------
    ConfigError
        If they are not rows of a parameter that is recorded.
    """
    if tokens is None:
        return dict(chosen)
    if isinstance(tokens, Mapping) == ("" in chosen):
        raise ConfigError(
            "tokens of the one `parameter=` are given as ids or a mask, those of several "
            '`parameters=` by name: tokens={"wte.weight": ids}'
        )
    of = tokens if isinstance(tokens, Mapping) else {"": tokens}
    if unknown := [name for name in of if name not in chosen]:
        raise ConfigError(
            f"tokens were given for {unknown[0]}, which is not recorded; recorded are "
            f"{_listed(chosen)}"
        )
    return {
        group: _with_rows(parameter, of[group]) if group in of else parameter
        for group, parameter in chosen.items()
    }


def _with_rows(chosen: Chosen, tokens: Rows) -> Chosen:
    rows = _row_ids(tokens, chosen.tensor.shape, chosen.name or "the parameter")
    if len(rows) == len(chosen.tensor):
        return chosen
    labels = chosen.labels
    if labels is not None:
        labels.check_length(len(chosen.tensor))
        labels = labels.of(rows)
    return replace(chosen, rows=rows, labels=labels)


def _row_ids(tokens: Rows, shape: torch.Size, name: str) -> np.ndarray:
    """Return rows as ids, ascending, each once."""
    given = tokens.numpy(force=True) if isinstance(tokens, Tensor) else np.asarray(tokens)
    if not shape:
        raise ConfigError(f"{name} is a single number and has no rows to choose among")
    if given.dtype == bool and given.shape != (shape[0],):
        raise ConfigError(
            f"{name} has {shape[0]} rows, and the mask of its tokens has shape {given.shape}; "
            "give one value for each row"
        )
    ids = np.flatnonzero(given) if given.dtype == bool else np.unique(given)
    if not (given.ndim == 1 and len(ids) and np.issubdtype(ids.dtype, np.integer)):
        raise ConfigError(
            f"the tokens of {name} are {given.size} values of {given.dtype}; expected at least "
            "one id, or a mask of all rows"
        )
    if not (ids[0] >= 0 and ids[-1] < shape[0]):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise ConfigError(f"{name} has rows 0 to {shape[0] - 1}, and {wrong} was chosen")
    return ids.astype(np.int64)


def check_recordable(optimizer: torch.optim.Optimizer, chosen: Iterable[Chosen]) -> None:
    """Raise OptimizerError unless the optimizer owns every parameter and a store can hold it."""
    owned = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    foreign = [
        parameter.name or f"of shape {tuple(parameter.tensor.shape)}"
        for parameter in chosen
        if id(parameter.tensor) not in owned
    ]
    if foreign:
        raise OptimizerError(
            f"the optimizer does not own the parameter {_listed(foreign)}; choose among those the "
            "optimizer was made with (after `model.to(...)`, not before)"
        )
    for parameter in chosen:
        check_parameter(parameter.tensor)
        native, shape = dtype_name(parameter.tensor), tuple(parameter.tensor.shape)
        if parameter.tensor.numel() == 0 or native not in RECORDABLE:
            raise OptimizerError(
                f"the parameter {parameter.name or 'given'} is {native} of shape {shape}; a "
                f"recording needs at least one element, in one of {', '.join(RECORDABLE)}"
            )


def _named_tensors(
    optimizer: torch.optim.Optimizer, parameters: Parameters, model: nn.Module | None
) -> list[tuple[str, Tensor]]:
    """Return what was chosen, with names, in order; a tensor may be there twice."""
    if isinstance(parameters, Mapping):
        return [(name, _tensor(value, name)) for name, value in parameters.items()]
    if isinstance(parameters, nn.Module):
        tensors = [tensor for tensor in parameters.parameters() if tensor.requires_grad]
        names = _names(parameters) if model is None else _names(model)
        return [(_name(tensor, names), tensor) for tensor in tensors]
    chosen = [parameters] if isinstance(parameters, str | Tensor) else list(parameters)
    names = _optimizer_names(optimizer) if model is None else _names(model)
    known = _optimizer_tensors(optimizer) if model is None else _tensors(model)
    found: list[tuple[str, Tensor]] = []
    for item in chosen:
        if isinstance(item, str):
            found += [(_name(tensor, names), tensor) for tensor in _matching(item, known)]
        else:
            found.append((_name(_tensor(item, "given"), names), item))
    return found


def _matching(pattern: str, known: Mapping[str, Tensor]) -> list[Tensor]:
    if not known:
        raise ConfigError(
            f"no parameter here has a name that {pattern!r} could match; pass `model=` too"
        )
    matching = {name: known[name] for name in known if fnmatch.fnmatchcase(name, pattern)}
    trainable = [tensor for tensor in matching.values() if tensor.requires_grad]
    if matching and not trainable:
        raise ConfigError(
            f"{pattern!r} matches only parameters that are not trained (requires_grad is False): "
            f"{_listed(matching)}"
        )
    if not matching:
        raise ConfigError(f"no parameter is named {pattern!r}; {_there_are(known, pattern)}")
    return trainable


def _there_are(names: Iterable[str], pattern: str) -> str:
    """Return the names that there are, or of many those that are most like a pattern."""
    names = list(names)
    close = difflib.get_close_matches(pattern, names, n=_MOST_NAMED, cutoff=0.4)
    if close and len(names) > _MOST_NAMED:
        return f"of {len(names)} names the nearest are {_listed(close)}"
    return f"there {'is' if len(names) == 1 else 'are'} {_listed(names)}"


def _tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise OptimizerError(
            f"the parameter {name} is a {type(value).__name__}; expected a tensor such as "
            "`embedding.weight`, or the pattern of a name"
        )
    return value


def _name(tensor: Tensor, names: Mapping[int, str]) -> str:
    if id(tensor) not in names:
        raise ConfigError(
            f"the parameter of shape {tuple(tensor.shape)} has no name here; pass the `model=` "
            'that has it, or name it yourself with parameters={"name": tensor}'
        )
    return names[id(tensor)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _names(model: nn.Module) -> dict[int, str]:
    """Return the first name of every parameter, by its identity."""
    return {id(tensor): name for name, tensor in model.named_parameters()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return parameters by the names that the optimizer was given with them, if it was."""
    return {
        name: tensor
        for group in optimizer.param_groups
        for name, tensor in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _optimizer_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    return {id(tensor): name for name, tensor in _optimizer_tensors(optimizer).items()}


def _once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return every tensor by the first name it comes with."""
    seen: set[int] = set()
    once: dict[str, Tensor] = {}
    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        once[name] = tensor
    return once


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + rest
