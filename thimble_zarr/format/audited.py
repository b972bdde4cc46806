"""How many steps of a recording were audited while it was made, as the ledger has it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True)
class AuditCounts:
    """Steps that were audited. Two of them add up.

    Attributes
    ----------
    checked
        Steps that were taken again, of all parameters that can be.
    unexplained
        Those of them after which something is not what the optimizer makes of the row before.
    """

    checked: int = 0
    unexplained: int = 0

    @classmethod
    def from_json(cls, record: Mapping[str, int]) -> Self:
        """Read what `to_json` wrote, by this version or by one that counts more or less."""
        return cls(record.get("checked", 0), record.get("unexplained", 0))

    def to_json(self) -> dict[str, int]:
        """Return what a line of the ledger has."""
        return asdict(self)

    def __str__(self) -> str:
        steps = f"{self.checked:,} step{'s' * (self.checked != 1)}"
        return f"{steps}, {f'{self.unexplained:,} un' if self.unexplained else 'all '}explained"

    def __add__(self, other: "AuditCounts") -> "AuditCounts":
        return AuditCounts(self.checked + other.checked, self.unexplained + other.unexplained)
