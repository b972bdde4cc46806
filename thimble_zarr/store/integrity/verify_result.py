"""What `verify` returns: discrepancies between a store and what was committed, as data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from thimble_zarr.format.location import Location
from thimble_zarr.format.schema import Json

HOW_TO_RESTORE = "restore the file from a copy (`thimble-zarr check` may name what was changed)"
"""What to do about a file that was changed by a program that gave it good checksums."""


@dataclass(frozen=True)
class Discrepancy:
    """Something in a store that is not as it was committed.

    Attributes
    ----------
    kind
        What it is, in a word.
    where
        The file, as a path in the store.
    what
        What is wrong there.
    repair
        What `repair` does about it.
    is_damage
        False of what harms nobody: what a crash left behind the last commit.
    first_row
        The first row that cannot be read for it, None where it concerns no rows of its own.
    """

    kind: str
    where: str
    what: str
    repair: str
    is_damage: bool = True
    first_row: int | None = None

    @property
    def is_beyond_repair(self) -> bool:
        """Whether `repair` can do nothing about it."""
        return self.is_damage and self.repair.startswith("none")


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found.

    Attributes
    ----------
    path
        The store.
    n_rows
        Rows that are committed, as far as that can be told.
    n_files, n_bytes
        Files of committed blocks that were read, and their size.
    findings
        What is not as it was committed, in the order of the files.
    repairs
        What repairs did to the store, as the ledger has it.
    """

    path: Location
    n_rows: int
    n_files: int
    n_bytes: int
    findings: Sequence[Discrepancy]
    repairs: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether everything that was committed is there, as it was committed."""
        return not any(finding.is_damage for finding in self.findings)

    def to_json(self) -> dict[str, Json]:
        """Return the result as the command line prints it."""
        return asdict(self) | {"path": str(self.path), "sound": self.holds}
