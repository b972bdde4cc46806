"""The commit record: how many rows of a store count, and how much of its ledger."""

from typing import Annotated, Self

import msgspec

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import FORMAT_VERSION
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.keys import COMMIT, LEDGER
from thimble_zarr.store.ledger import read_last_line, seal, unseal

_MAX_BYTES = 4096

Count = Annotated[int, msgspec.Meta(ge=0)]


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The commit record.

    Attributes
    ----------
    n_rows
        Committed rows: rows 0 to `n_rows - 1` can be read.
    complete
        True once the writer has closed the store.
    ledger_bytes, ledger_crc32
        How much of the ledger counts, and the CRC-32 of that much. (A chunk file ends with its own
        crc32c, and the crc32c of any such file is the same constant: the ledger needs another.)
    """

    n_rows: Count = 0
    complete: bool = False
    ledger_bytes: Count = 0
    ledger_crc32: Count = 0

    @classmethod
    def read(cls, files: Files) -> Self:
        """Read the commit record of a store.

        Raises
        ------
        DamagedStoreError
            If there is none or it is malformed.
        """
        try:
            record = unseal(files.get(COMMIT, _MAX_BYTES))
            if record.pop("format_version", None) != FORMAT_VERSION:
                raise ValueError("it has another format version")
            return msgspec.convert(record, cls)
        except FileNotFoundError as error:
            raise DamagedStoreError("it has no commit record") from error
        except ValueError as error:
            raise DamagedStoreError(f"its commit record is malformed: {error}") from error

    @classmethod
    def read_checked(cls, files: Files) -> Self:
        """Read it, unless it claims other rows than the last line that it covers.

        A ledger that cannot be read, or is cut off, says nothing against it: `verify` looks into
        that.
        """
        commit = cls.read(files)
        try:
            last = read_last_line(files.path / LEDGER, commit.ledger_bytes)
        except (OSError, ValueError):
            return commit
        if last is None:
            end, n_rows = 0, 0
        elif last.entry is None:
            return commit
        else:
            end, n_rows = last.stop, last.entry["rows"][1]
        if end == commit.ledger_bytes and n_rows != commit.n_rows:
            raise DamagedStoreError(
                f"its commit record claims {commit.n_rows:,} rows, and the ledger has {n_rows:,}; "
                "`thimble-zarr repair` writes the record again from the ledger"
            )
        return commit

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return seal({"format_version": FORMAT_VERSION, **msgspec.structs.asdict(self)})
