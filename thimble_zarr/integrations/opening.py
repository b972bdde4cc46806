"""Open a recorder on what a trainer holds: a wrapped optimizer and a model."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from thimble_zarr.errors import ConfigError, OptimizerError
from thimble_zarr.format.store import StorePath
from thimble_zarr.record.recorder import Recorder


def open_recorder(
    path: StorePath,
    optimizer: object,
    *,
    model: nn.Module,
    parameters: str,
    **options: Any,
) -> Recorder:
    """Record the steps that the optimizer takes on parameters of a model.

    Parameters
    ----------
    path
        Store to create.
    optimizer
        torch's optimizer, or what a trainer has wrapped it in.
    model
        The model that is trained.
    parameters
        Name of the parameter, or a pattern that only its name matches, such as `"*.wte.weight"`.
    options
        Anything else that `Recorder` takes.

    Returns
    -------
    Recorder

    Raises
    ------
    ConfigError
        If no parameter has such a name, or several have.
    OptimizerError, StoreError
        As `Recorder` raises them.
    """
    return _recorder(path, unwrapped(optimizer), model=model, parameters=parameters, **options)


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """Return torch's optimizer, out of any wrappers: it alone calls the hooks of its steps."""
    while isinstance(within := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = within
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"a {type(optimizer).__name__} is no optimizer of torch")
    return optimizer


def _recorder(
    path: StorePath,
    optimizer: torch.optim.Optimizer,
    *,
    model: nn.Module,
    parameters: str,
    **options: Any,
) -> Recorder:
    """Return `Recorder(path, optimizer, model=model, parameters=parameters)`, of one parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))  # tied ones have several names
    matching = {named[name]: name for name in reversed(named) if fnmatchcase(name, parameters)}
    if len(matching) != 1:
        found = ", ".join(reversed(matching.values())) or "none"
        matrices = ", ".join(name for name, parameter in named.items() if parameter.ndim == 2)
        raise ConfigError(
            f"parameters={parameters!r} must be the name of one parameter, and matches {found}; "
            f"parameters of shape (token, dim) are: {matrices}"
        )
    ((parameter, name),) = matching.items()
    return Recorder(path, optimizer, parameter=parameter, name=name, **options)
