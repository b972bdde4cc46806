"""What may be wrong with a store of `stores.write_run`: damage to files, and changes to values."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from tests.support.faults import everything
from thimble_zarr.errors import (
    ThimbleError,
)
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.ledger import seal, unseal


def files(path: Path) -> list[str]:
    """Return the files of a store that hold anything."""
    return sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.stat().st_size
    )


def changes(content: bytes, n_places: int) -> Iterator[tuple[str, bytes]]:
    """Yield what may become of a file: bytes flipped, left out, zeroed, and the file cut off."""
    rng = np.random.default_rng(len(content))
    every = n_places >= len(content)
    places = range(len(content)) if every else sorted(rng.choice(len(content), n_places))
    for place in places:
        flipped = content[place] ^ (1 << int(rng.integers(8)))
        yield f"flip {place}", content[:place] + bytes([flipped]) + content[place + 1 :]
        if not every or place % 7 == 0:
            yield f"cut at {place}", content[:place]
            yield f"leave out {place}", content[:place] + content[place + 1 :]
            yield f"zero {place}", content[:place] + b"\0" + content[place + 1 :]
    yield "zeros", bytes(len(content))
    yield "twice", content + content


def is_found(path: Path) -> bool:
    try:
        return bool(verify(path).findings)
    except ThimbleError:
        return True


def sweep(path: Path, n_places: int) -> dict[str, int]:
    """Change every file of a store in many ways; return how many were found, and how many not.

    What is not found changes nothing that is read.
    """
    truth = everything(path)
    counts = {"found": 0, "harmless": 0}
    for key in files(path):
        file = path / key
        content = file.read_bytes()
        for what, changed in changes(content, n_places):
            if changed == content:
                continue
            file.write_bytes(changed)
            if is_found(path):
                counts["found"] += 1
            else:
                counts["harmless"] += 1
                assert json.loads(changed) == json.loads(content), f"{what} in {key}"
                assert everything(path) == truth, f"{what} in {key}"
        file.unlink()
        assert is_found(path), f"{key} is gone"
        file.write_bytes(content)
    assert everything(path) == truth
    return counts


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON document."""
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def link(file: Path) -> None:
    """Replace a file by a link to it, out of the store."""
    target = file.parents[2] / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def swap(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def last_line_gone(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "flipped": (lambda path: flip(path / "W/c.1.0.0"), "damaged-block", 4),
    "flipped index": (lambda path: flip(path / "grad/c.2.0.0", 1), "damaged-block", 8),
    "missing block": (lambda path: (path / "W/c.2.0.0").unlink(), "damaged-block", 8),
    "empty": (lambda path: (path / "grad/c.1.0.0").write_bytes(b""), "damaged-block", 4),
    "linked": (lambda path: link(path / "W/c.2.0.0"), "damaged-block", 8),
    "a pipe": (lambda path: fifo(path / "W/c.2.0.0"), "damaged-block", 8),
    "loss": (lambda path: flip(path / "loss/c.0"), "damaged-values", 10),
    "steps": (lambda path: (path / "step/c.0").unlink(), "damaged-values", 10),
    "tokens": (lambda path: flip(path / "token/c.0"), "damaged-values", 10),
    "counts": (lambda path: flip(path / "count/c.0"), "damaged-values", 10),
    "texts": (lambda path: flip(path / "text_end/c.0"), "damaged-values", 10),
    "commit": (lambda path: flip(path / ".thimble/commit.json"), "commit-record", 10),
    "no commit": (lambda path: (path / ".thimble/commit.json").unlink(), "commit-record", 10),
    "first line": (lambda path: flip(path / ".thimble/blocks.jsonl", 0.01), "ledger", 10),
    "last line": (lambda path: flip(path / ".thimble/blocks.jsonl", 0.99), "ledger", 10),
    "line gone": (lambda path: last_line_gone(path / ".thimble/blocks.jsonl"), "ledger", 10),
    "no ledger": (lambda path: (path / ".thimble/blocks.jsonl").unlink(), "ledger", 10),
    "schema": (lambda path: flip(path / "zarr.json", 0.001), "metadata", 10),
    "no schema": (lambda path: (path / "zarr.json").unlink(), "metadata", 10),
    "no metadata": (lambda path: (path / "W/zarr.json").unlink(), "metadata", 10),
    "shape": (
        lambda path: edit(path / "W/zarr.json", lambda array: array["shape"].__setitem__(0, 9)),
        "metadata",
        10,
    ),
    "fill": (
        lambda path: edit(path / "loss/zarr.json", lambda array: array.update(fill_value=0.0)),
        "metadata",
        10,
    ),
    "dims": (
        lambda path: edit(path / "W/zarr.json", lambda array: array["dimension_names"].reverse()),
        "metadata",
        10,
    ),
    "attrs": (
        lambda path: edit(
            path / "zarr.json",
            lambda group: group["attributes"]["thimble"]["optimizer"].update(amsgrad=True),
        ),
        "metadata",
        10,
    ),
}


def chunk_files(path: Path) -> list[str]:
    return [file for file in files(path) if "/c." in file and (path / file).is_file()]


def store_again(path: Path, name: str, index: Any, value: Any) -> None:
    """Change a value through zarr-python, which gives the file a checksum that is right."""
    zarr.open_array(path, path=name, mode="r+")[index] = value


CHANGED: dict[str, Callable[[Path], object]] = {
    "two values": lambda path: store_again(path, "learning_rate", slice(6, 8), 0.25),
    "many values": lambda path: store_again(path, "loss", slice(2, 9), 0.0),
    "a label": lambda path: store_again(path, "count", 3, 99),
    "a weight": lambda path: store_again(path, "W", (5, 3, 2), 1),
}


def consolidated(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return what changes the root's copies of the arrays' metadata."""
    return lambda path: edit(
        path / "zarr.json", lambda group: change(group["consolidated_metadata"]["metadata"])
    )


WRONG_COPIES: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "shape": (
        consolidated(lambda copies: copies["W"].update(shape=[7, 11, 5])),
        True,
        "its copy of the metadata of W is wrong: its shape is [7, 11, 5], and 10 rows",
    ),
    "missing array": (
        consolidated(lambda copies: copies.pop("grad")),
        True,
        "its copy of the metadata of grad is wrong: it is missing",
    ),
    "dims": (
        consolidated(lambda copies: copies["grad"]["dimension_names"].reverse()),
        True,
        "its copy of the metadata of grad is wrong: its dimension_names",
    ),
    "no copies": (
        lambda path: edit(path / "zarr.json", lambda group: group.pop("consolidated_metadata")),
        False,
        "it has no copy",
    ),
    "null": (
        lambda path: edit(
            path / "zarr.json", lambda group: group.update(consolidated_metadata=None)
        ),
        False,
        "it has no copy",
    ),
    "one of another type": (
        lambda path: edit(
            path / "zarr.json", lambda group: group["consolidated_metadata"].update(kind=1)
        ),
        False,
        "its copies of the arrays' metadata are out of date",
    ),
    "an array that is not there": (
        consolidated(lambda copies: copies.update(gone=copies["W"])),
        False,
        "its copies of the arrays' metadata are out of date",
    ),
}


def reseal(path: Path, **fields: object) -> None:
    """Change what the commit record says, and give it a checksum that is right."""
    file = path / ".thimble/commit.json"
    file.write_bytes(seal(unseal(file.read_bytes(), dict) | fields))
