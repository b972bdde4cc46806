"""The ledger's lines, and the commit record: JSON that ends with its own checksum.

A line is a promise: it is on disk before any file that it tells of has its name. So whatever a
crash left, each file is the one that the last committed line tells of, or one of a line behind it,
and a line that was torn told of nothing yet. (A chunk file ends with its own crc32c, and the crc32c
of any such file is the same constant: lines need another, and have CRC-32.)
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble_zarr.errors import StoreError
from thimble_zarr.format.documents import MAX_DOCUMENT_BYTES, TooLargeError, check_size, parsed
from thimble_zarr.format.schema import Json
from thimble_zarr.store.files.documents import open_regular

MAX_LINE_BYTES = MAX_DOCUMENT_BYTES
"""Longest line that is read. A line has some 30 bytes a chunk of its block."""

_PIECE_BYTES = 2**16

_SEAL = b', "crc32": '


@dataclass(frozen=True)
class Line:
    """A line of the ledger.

    Attributes
    ----------
    start
        Its first byte.
    content
        Its bytes, the last of which ends it.
    entry
        What it says, None where its checksum does not match or it is no line of a ledger.
    """

    start: int
    content: bytes
    entry: Mapping[str, Any] | None

    @property
    def stop(self) -> int:
        """The byte behind its last."""
        return self.start + len(self.content)


def seal(entry: Mapping[str, Json]) -> bytes:
    """Return an entry as JSON, with the checksum of all that comes before it as the last item.

    Raises
    ------
    StoreError
        If it is more than is read.
    """
    content = json.dumps(entry).encode()[:-1]
    sealed = content + _SEAL + str(zlib.crc32(content)).encode() + b"}"
    try:
        check_size(sealed + b"\n")
    except TooLargeError as error:
        raise StoreError(
            f"a line of the ledger cannot be written: {error}; record fewer parameters in a store"
        ) from error
    return sealed


def unseal(content: bytes) -> dict[str, Any]:
    """Return the entry that `seal` made, without its checksum.

    Raises
    ------
    ValueError
        If its checksum does not match, or there is none.
    """
    value, _, checksum = content.rstrip(b"\n").rpartition(_SEAL)
    if checksum != str(zlib.crc32(value)).encode() + b"}":
        raise ValueError("its checksum does not match")
    entry = parsed(value + b"}")
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    return entry


def read_lines(file: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """Yield the lines of a ledger, one in memory at a time.

    Parameters
    ----------
    file
        The ledger.
    start, stop
        Bytes to read, whole lines. To the end by default, where the last may not be whole.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with open_regular(file) as ledger:
        end = os.fstat(ledger.fileno()).st_size
        end = end if stop is None else min(stop, end)
        ledger.seek(start)
        while start < end:
            content = ledger.readline(min(end - start, MAX_LINE_BYTES))
            if not content:
                return
            yield Line(start, content, _entry(content))
            start += len(content)


def read_last_line(file: Path, stop: int) -> Line | None:
    """Return the line that ends at a byte, or where the file ends before it; None if it has none.

    It reads a few times the longest line at most, whatever the file holds.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    content = b""
    with open_regular(file) as ledger:
        start = stop = min(stop, os.fstat(ledger.fileno()).st_size)
        while start and b"\n" not in content[:-1] and len(content) <= MAX_LINE_BYTES:
            n_bytes = min(start, max(_PIECE_BYTES, len(content)))
            start -= n_bytes
            ledger.seek(start)
            content = ledger.read(n_bytes) + content
    begin = content[:-1].rfind(b"\n") + 1
    return Line(start + begin, content[begin:], _entry(content[begin:])) if content else None


FileChecksums = int | tuple[int | None, ...]
"""What a file is known by: its CRC-32, or of a shard the stored checksums of its chunks."""


def recorded_files(entries: Iterable[Mapping[str, Any]]) -> dict[FileChecksums, str]:
    """Return every file that was ever committed, by what it is known by."""
    files: dict[FileChecksums, str] = {}
    for entry in entries:
        for key, file in entry["files"].items():
            chunks = entry["chunks"].get(key.rpartition("/")[0])
            known = file.get("crc32") if chunks is None else tuple(stored for stored, _ in chunks)
            files[known] = key
    return files


def _entry(content: bytes) -> dict[str, Any] | None:
    try:
        entry = unseal(content) if content.endswith(b"\n") else None
        return entry if entry is not None and _is_whole(entry) else None
    except ValueError:
        return None


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Whether a line has what every line has."""
    rows, files, chunks = (entry.get(name) for name in ("rows", "files", "chunks"))
    return (
        isinstance(rows, list)
        and len(rows) == 2
        and all(type(row) is int and row >= 0 for row in rows)
        and isinstance(files, dict)
        and all(
            isinstance(file, dict) and type(file.get("bytes")) is int for file in files.values()
        )
        and isinstance(chunks, dict)
    )
