"""JSON documents of a store, which may come from anywhere: they are read with bounds."""

from typing import Any

from thimble_zarr.format import documents
from thimble_zarr.store.files.base import Files


def read_document(files: Files, key: str) -> Any:
    """Return a JSON document of a store.

    Raises ValueError if it is not JSON, too large, too deep, or no plain file.
    """
    with files.open(key) as file:
        if file.n_bytes > documents.MAX_DOCUMENT_BYTES:
            raise ValueError(f"it is larger than {documents.MAX_DOCUMENT_BYTES:,} bytes")
        return documents.parsed(file.read(0, file.n_bytes))
