"""A real object store for measurements, where this process and those that it starts find it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import Weed, make_bucket, weed

BUCKET = "bucket"

OPTIONS = ("-volume.readBufferSizeMB=1",)
"""What its administrator would set: the server reads files through buffers of that size, and those
of 4 MB, its default, leave the processor's cache before they are sent."""


@contextmanager
def object_store(directory: Path) -> Iterator[Weed]:
    """Start SeaweedFS with a bucket, and say in the environment where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    with weed(directory, options=OPTIONS) as server:
        make_bucket(server, BUCKET)
        use(f"http://127.0.0.1:{server.s3}")
        yield server


def use(address: str) -> None:
    """Say in the environment which server is meant."""
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
