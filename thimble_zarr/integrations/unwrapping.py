"""Trainers wrap torch's optimizer; what is recorded are its own steps."""

import torch

from thimble_zarr.errors import OptimizerError


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """Return torch's optimizer, out of any wrappers: it alone calls the hooks of its steps.

    Raises
    ------
    OptimizerError
        If there is none.
    """
    while isinstance(within := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = within
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"a {type(optimizer).__name__} is no optimizer of torch")
    return optimizer
