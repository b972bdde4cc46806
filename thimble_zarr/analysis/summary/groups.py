"""The groups of tokens that a run is summed up for: dead, live, all, and those that were named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.selection import select_tokens
from thimble_zarr.errors import SelectionError

Members = str | Sequence[int] | np.ndarray
"""Tokens: ids, a mask of all that are selected, or text as `--tokens` takes it."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of selected tokens, by name.

    Attributes
    ----------
    names
        What they are called.
    is_member
        Which of the selected tokens are in each, bool, shape `(group, token)`.
    """

    names: tuple[str, ...]
    is_member: np.ndarray

    @classmethod
    def of(cls, selected: Selected, named: Mapping[str, Members]) -> "Groups":
        """Return dead and live, where it is known which tokens are and there are some, all, others.

        Raises SelectionError if a group that was named is empty, or has tokens that are not there.
        """
        labels, tokens = selected.source.labels, np.asarray(selected.tokens, np.int64)
        masks = {
            name: mask[tokens]
            for name, mask in (("dead", labels.dead), ("live", labels.live))
            if mask is not None
        }
        masks["all"] = np.ones(len(tokens), bool)
        for name, members in named.items():
            if name in masks:
                raise SelectionError(
                    f"the group {name} is there always, and means the tokens that are known to be "
                    "so; give yours another name"
                )
            if name in ("", ".", "..") or {*name} & {*"/\\\0"}:
                raise SelectionError(
                    f"a group cannot be called {name!r}: pictures of it lie in a folder of its "
                    "name; give it a name without / and \\"
                )
            masks[name] = _mask(selected, name, members)
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        return cls((*masks,), np.stack([*masks.values()]))

    def joined(self, others: "Groups") -> "Groups":
        """Return others and then these; where two have one name, that of these."""
        if others.is_member.shape[1:] != self.is_member.shape[1:]:
            return self
        masks = dict(zip(others.names, others.is_member, strict=True))
        masks |= dict(zip(self.names, self.is_member, strict=True))
        return Groups((*masks,), np.stack([*masks.values()]))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Groups)
            and self.names == other.names
            and np.array_equal(self.is_member, other.is_member)
        )

    @cached_property
    def classes(self) -> np.ndarray:
        """Which class each token is of, int, shape `(token,)`: those of one are in the same groups.

        No token is of two.
        """
        return self._classes[1]

    @cached_property
    def has_class(self) -> np.ndarray:
        """Whether each group has the tokens of each class, bool, shape `(group, class)`."""
        return self._classes[0]

    @cached_property
    def _classes(self) -> tuple[np.ndarray, np.ndarray]:
        has_class, classes = np.unique(self.is_member, axis=1, return_inverse=True)
        return has_class, classes.reshape(-1)


def _mask(selected: Selected, name: str, members: Members) -> np.ndarray:
    ids = selected.ids
    if isinstance(members, str):
        try:
            _, positions = select_tokens(selected.source, members)
        except SelectionError as error:
            reason = str(error).removeprefix(f"--tokens {members}: ")
            raise SelectionError(f"the group {name}={members}: {reason}") from error
        mask = np.isin(selected.tokens, positions)
    else:
        given = np.asarray(members)
        if given.dtype == bool:
            if given.shape != ids.shape:
                raise SelectionError(
                    f"the mask of the group {name} has shape {given.shape}; expected a value for "
                    f"each of the {len(ids):,} tokens"
                )
            mask = given
        elif given.size and given.dtype.kind not in "iu":
            raise SelectionError(f"the group {name} must be ids or a mask, not {given.dtype}")
        elif len(unknown := np.setdiff1d(given, ids)):
            raise SelectionError(f"the group {name} has token {unknown[0]}, which is not there")
        else:
            mask = np.isin(ids, given)
    if not mask.any():
        raise SelectionError(f"the group {name} is empty; leave it out or name other tokens")
    return mask
