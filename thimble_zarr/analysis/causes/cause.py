"""What a cause is: something that can be wrong with a record, with a name and a message."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from thimble_zarr.analysis.causes.evidence import Evidence, Failure

Facts = Mapping[str, Any]
"""What a cause found out: the blanks of its message, and `step`, `token`, `dim`, `variable` where
they are other than those of the first wrong element. Step and token are given as to `Evidence`."""


class Named:
    """Something that can be wrong with a record. The docstring of each class is its message."""

    code: ClassVar[str]


class Cause(Named, ABC):
    """Something that shows in the replay."""

    is_local: ClassVar[bool] = False
    """Whether each place is a finding of its own."""
    is_everywhere: ClassVar[bool] = False
    """Whether every token is concerned, and not the one that fails first."""
    needs_formula: ClassVar[bool] = False

    @abstractmethod
    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        """Return what is found out if this is the cause of the failure, else None."""
