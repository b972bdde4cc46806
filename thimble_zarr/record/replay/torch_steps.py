"""Steps of one recorded parameter, taken again with torch's own code, a part of a row at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import decode, fill_value, is_nan, patterns
from thimble_zarr.format.layout import AUDIT_ELEMENTS
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.lanes import Lanes, Piece, one_thread
from thimble_zarr.optim.replay import Program

Bits = Mapping[str, np.ndarray]
"""Stored bits by variable."""


def why_not(schema: Schema) -> str:
    """Return why steps of a parameter cannot be taken again; empty where they can."""
    if not schema.optimizer.CAN_BE_REPLAYED:
        return f"nobody told how {schema.optimizer.name} takes a step (register_optimizer)"
    missing = [name for name in schema.optimizer.variables if name not in schema.dtypes]
    if missing:
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not recorded"
    if schema.device != "cpu":
        return f"it is on {schema.device}, and only steps on the CPU are taken again"
    if not schema.contiguous:
        return "its memory is not contiguous, and torch rounds some of its elements otherwise"
    if not schema.optimizer.ELEMENTWISE and schema.whole_tokens not in (None, schema.n_tokens):
        return (
            f"a step of {schema.optimizer.name} needs the whole parameter, and only "
            f"{schema.n_tokens:,} of {schema.whole_tokens:,} tokens are recorded"
        )
    return ""


def prepare() -> None:
    """Let torch use one thread in the thread that calls this, before training makes threads."""
    with one_thread():
        pass


class TorchSteps:
    """Takes steps of a parameter, of which only the tokens `ids` are recorded, if any are given.

    Rows are flattened: an element is a place in `token * n_dims + dim`. Of an optimizer that is not
    elementwise there is one part, the whole row, whose step takes the threads that training has.
    """

    def __init__(self, schema: Schema, ids: np.ndarray | None) -> None:
        self._schema, self._ids = schema, ids
        self._known_pieces: dict[int, list[Piece]] = {}

    def parts(self, n_elements: int | None = None) -> Iterator[slice]:
        """Cut elements, all of a row if None, into parts of which a step is taken at once."""
        n_all = self._schema.n_tokens * self._schema.n_dims
        n_elements = n_all if n_elements is None else n_elements
        length = AUDIT_ELEMENTS if self._schema.optimizer.ELEMENTWISE else max(1, n_all)
        for start in range(0, n_elements, length):
            yield slice(start, min(start + length, n_elements))

    def step(self, inputs: Bits, part: slice | np.ndarray, scalars: Mapping[str, float]) -> Bits:
        """Return `W` and the states of a part after a step: missing, if it cannot be taken.

        `inputs` are those before it, and the gradient, of the part alone.
        """
        with suppress(ArithmeticError):
            return self._program.step(inputs, self._pieces(part), scalars)
        return {
            name: np.full_like(bits, fill_value(self._schema.dtypes[name]))
            for name, bits in inputs.items()
            if name != "grad"
        }

    def alone(self) -> np.ndarray:
        """Return the elements that torch takes one at a time: at most 63 a thread."""
        found = []
        for part in self.parts():
            places = self._places(np.arange(part.start, part.stop))
            found.append(part.start + np.flatnonzero(self._lanes.are_alone(places)))
        return np.concatenate(found)

    def _pieces(self, part: slice | np.ndarray) -> list[Piece]:
        """Return how torch goes through a part of a row."""
        if not self._schema.optimizer.ELEMENTWISE:
            n = self._schema.n_tokens * self._schema.n_dims
            return [Piece(slice(n), slice(n), n)]
        if isinstance(part, slice) and part.start in self._known_pieces:
            return self._known_pieces[part.start]
        elements = np.arange(part.start, part.stop) if isinstance(part, slice) else part
        pieces = self._lanes.split(self._places(elements))
        if isinstance(part, slice):
            self._known_pieces[part.start] = pieces
        return pieces

    def _places(self, elements: np.ndarray) -> np.ndarray:
        """Return where elements of what is recorded lie in the whole parameter."""
        if self._ids is None:
            return elements
        tokens, dims = np.divmod(elements, self._schema.n_dims)
        places: np.ndarray = self._ids[tokens] * self._schema.n_dims + dims
        return places

    @cached_property
    def _program(self) -> Program:
        schema, how = self._schema, dict[str, Any]()
        if not schema.optimizer.ELEMENTWISE:
            how = {"shape": schema.shape, "n_threads": schema.n_threads}
        return Program(schema.optimizer, schema.dtypes, schema.device, **how)

    @cached_property
    def _lanes(self) -> Lanes:
        return Lanes.of(
            self._schema.optimizer.implementation,
            n_elements=self._schema.n_elements,
            n_threads=self._schema.n_threads,
        )


@dataclass(frozen=True)
class Wrong:
    """Elements of a flattened row that have other bits than its steps give.

    `n_wrong` says of each variable how many they are, and `first` which is the first, where there
    are any. `recorded` and `computed` are the bits of the first of all, which is of the variable
    `name`.
    """

    n_wrong: Mapping[str, int]
    first: Mapping[str, int]
    name: str
    recorded: np.ndarray
    computed: np.ndarray

    @classmethod
    def of(
        cls, names: Sequence[str], parts: Iterable[tuple[slice | np.ndarray, Bits, Bits]]
    ) -> Self | None:
        """Return what is wrong with parts of a row, ascending; None if nothing is.

        Of each part come its elements, and the variables as recorded and as computed. NaN is as
        good as any other.
        """
        n_wrong, firsts = dict[str, int](), list[tuple[int, str, np.ndarray, np.ndarray]]()
        for part, recorded, computed in parts:
            for name in (*names[1:], "W"):  # whatever is wrong in a state makes W wrong
                is_off = patterns(recorded[name]) != patterns(computed[name])
                is_off &= ~(is_nan(recorded[name]) & is_nan(computed[name]))
                if n_off := int(np.count_nonzero(is_off)):
                    n_wrong[name] = n_wrong.get(name, 0) + n_off
                    one = int(is_off.argmax())
                    element = part.start + one if isinstance(part, slice) else int(part[one])
                    firsts.append((element, name, recorded[name][one], computed[name][one]))
        if not firsts:
            return None
        _, name, *values = min(firsts, key=lambda first: first[0])
        first: dict[str, int] = {}
        for element, of, *_ in firsts:
            first.setdefault(of, element)
        return cls({of: n_wrong[of] for of in names if of in n_wrong}, first, name, *values)

    def place(self, schema: Schema, ids: np.ndarray | None) -> dict[str, Any]:
        """Return where the first of all is, and its numbers, as an `AuditFinding` has them."""
        token, dim = divmod(self.first[self.name], schema.n_dims)
        recorded, computed = (
            float(decode(bits.reshape(1), schema.dtypes[self.name], np.float64)[0])
            for bits in (self.recorded, self.computed)
        )
        return {
            "token": token if ids is None else int(ids[token]),
            "dim": dim,
            "variable": self.name,
            "recorded": recorded,
            "computed": computed,
            "n_wrong": self.n_wrong,
        }
