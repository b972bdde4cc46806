"""Every optimizer that can be recorded. A new one is a file beside this one, and a line in here."""

import functools
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_origin, get_type_hints

from thimble_zarr.errors import ConfigError
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.specs.adadelta import Adadelta
from thimble_zarr.optim.specs.adafactor import Adafactor
from thimble_zarr.optim.specs.adagrad import Adagrad
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.optim.specs.adamax import Adamax
from thimble_zarr.optim.specs.asgd import ASGD
from thimble_zarr.optim.specs.muon import Muon
from thimble_zarr.optim.specs.nadam import NAdam
from thimble_zarr.optim.specs.radam import RAdam
from thimble_zarr.optim.specs.rmsprop import RMSprop
from thimble_zarr.optim.specs.rprop import Rprop
from thimble_zarr.optim.specs.sgd import SGD
from thimble_zarr.optim.third_party.lion import Lion
from thimble_zarr.optim.third_party.schedule_free import ScheduleFree
from thimble_zarr.optim.unknown import Unknown, is_name

REGISTRY: Mapping[str, type[Optimizer]] = {
    "ASGD": ASGD,
    "Adadelta": Adadelta,
    "Adafactor": Adafactor,
    "Adagrad": Adagrad,
    "Adam": Adam,
    "AdamW": Adam,
    "Adamax": Adamax,
    "Muon": Muon,
    "NAdam": NAdam,
    "RAdam": RAdam,
    "RMSprop": RMSprop,
    "Rprop": Rprop,
    "SGD": SGD,
}
"""What an optimizer is, by the name of its class in `torch.optim`."""

OTHERS: dict[str, type[Optimizer]] = {
    name: spec for spec in (Lion, ScheduleFree) for name in spec.CLASSES
}
"""What an optimizer of another package is, by the name of its class and module."""

REFUSED: Mapping[str, str] = {
    "LBFGS": "a step computes the loss several times, each with other weights and gradients",
    "SparseAdam": "its gradients are sparse, and of a row without one the states stay as they are",
}
"""Optimizers of torch whose steps are not what a row has, and why."""

SPECS = tuple(dict.fromkeys((*REGISTRY.values(), *OTHERS.values())))

VARIABLES: Mapping[str, str] = {
    "W": "weight after the step",
    "grad": "gradient that the step consumed",
    **{state.name: state.long_name for spec in SPECS for state in spec.STATES},
}
"""The arrays of a parameter's shape a store can hold; row t belongs to optimizer step t."""

SCALARS: Mapping[str, str] = {
    "loss": "training loss of the step, nats",
    **{scalar.name: scalar.long_name for spec in SPECS for scalar in spec.SCALARS},
    COUNT: "the optimizer's own step count for this parameter, after the step",
}
"""The float64 `(step,)` arrays a store can hold. Missing is NaN."""


def step_scalars(spec: type[Optimizer]) -> dict[str, str]:
    """Return the float64 `(step,)` arrays of a run of an optimizer, and what they are, in words."""
    own = {scalar.name: scalar.long_name for scalar in spec.SCALARS}
    return {"loss": SCALARS["loss"], **own, COUNT: SCALARS[COUNT]}


def variable_name(variable: str) -> str:
    """Return what an array of a parameter's shape is, in words."""
    registered = (state for spec in OTHERS.values() for state in spec.STATES)
    known = {state.name: state.long_name for state in registered} | dict(VARIABLES)
    return known.get(variable, f"{variable} that the optimizer kept after the step")


def register_optimizer(spec: type[Optimizer]) -> None:
    """Make an optimizer of another package known: recorded, replayed and checked by its spec.

    Do so before a recorder is made, and before a store that was recorded so is read.

    Parameters
    ----------
    spec
        What it is. Its `CLASSES` are the package's, such as `lion_pytorch.lion_pytorch.Lion`.

    Raises
    ------
    ConfigError
        If it has no classes, or one of its names cannot be in a store.

    Examples
    --------
    >>> from thimble_zarr.optim.third_party.lion import Lion
    >>> register_optimizer(Lion)  # as this package does itself
    """
    if not spec.CLASSES:
        raise ConfigError(f"{spec.__name__} does not say in CLASSES which classes it is of")
    for name in (*(of.name for of in spec.STATES), *(of.name for of in spec.SCALARS)):
        if not is_name(name):
            raise ConfigError(f"a state or number of {spec.__name__} cannot be called {name!r}")
    OTHERS.update(dict.fromkeys(spec.CLASSES, spec))


def spec_of(kind: type) -> type[Optimizer] | None:
    """Return what an optimizer of a torch class, or of a subclass of one, is; None if unknown."""
    for base in kind.__mro__:
        if spec := OTHERS.get(f"{base.__module__}.{base.__qualname__}"):
            return spec
        if base.__module__.startswith("torch.optim") and base.__name__ in REGISTRY:
            return REGISTRY[base.__name__]
    return None


_FUNCTIONS_BEFORE = {"decoupled_weight_decay": "adam", "has_momentum": "sgd"}
"""The functions that stores of before do not name, each by a flag that tells it."""


def read_optimizer(content: Mapping[str, object]) -> Optimizer:
    """Return an optimizer from its fields, as JSON has them.

    That of a subclass is known by its function; without one, by all of its fields.

    Raises
    ------
    TypeError
        If they are not those of any.
    """
    specs: tuple[type[Optimizer], ...] = (*SPECS, *OTHERS.values(), Unknown)
    named = {of.rpartition(".")[2]: spec for of, spec in OTHERS.items()} | dict(REGISTRY)
    before = (of for flag, of in _FUNCTIONS_BEFORE.items() if flag in content)
    function = content.get("function", next(before, None))
    known = [
        spec
        for spec in specs
        if {*content} <= (its := {field.name for field in fields(spec)})
        and (its == {*content} if function is None else getattr(spec, "FUNCTION", "") == function)
    ]
    spec = named.get(str(content["name"]), known[0] if known else None)
    if spec is None:
        raise TypeError(
            f"no optimizer is known that has {', '.join(content)}; if you registered a spec to "
            "record it (register_optimizer), do so again"
        )
    return spec(**checked(spec, content))


_types_of = functools.cache(get_type_hints)
"""The types of a class's fields: to find them takes most of the time to open a store."""


def checked(kind: type, content: Mapping[str, object]) -> dict[str, Any]:
    """Return content of JSON for the fields of a dataclass.

    Raises
    ------
    TypeError
        If some of it is of another type than its field.
    """
    types = _types_of(kind)
    for name, value in content.items():
        expected = types.get(name, object)
        generic = get_origin(expected)
        if not isinstance(value, expected if generic in (None, UnionType) else generic):
            raise TypeError(f"{name} is {value!r}")
    return dict(content)
