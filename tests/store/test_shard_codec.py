"""Our shards, read by Zarr and by TensorStore."""

import dataclasses
import itertools
import os
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.storage import LocalStore, MemoryStore

from thimble_zarr import tuning
from thimble_zarr.store.coding.compression import COMPRESSIONS, DEFAULT
from thimble_zarr.store.coding.shard_codec import (
    CHUNK_ORDER,
    ShardEncoder,
    ShardFile,
    decode_vector,
    encode_vector,
)
from thimble_zarr.store.files.local import LocalFiles

FILL = 7


def chunk_codecs(dtype: str) -> list[BloscCodec | Crc32cCodec]:
    size = np.dtype(dtype).itemsize
    return [BloscCodec(typesize=size, cname="lz4", clevel=9, shuffle="shuffle"), Crc32cCodec()]


def declare(
    store: object, shape: tuple[int, int, int], chunk_tokens: int, dtype: str
) -> zarr.Array:
    block_steps, n_tokens, n_dims = shape
    shard_tokens = -(-n_tokens // chunk_tokens) * chunk_tokens
    return zarr.create_array(
        store,
        shape=shape,
        chunks=(block_steps, chunk_tokens, n_dims),
        shards=(block_steps, shard_tokens, n_dims),
        dtype=dtype,
        filters=[TransposeCodec(order=CHUNK_ORDER)],
        compressors=chunk_codecs(dtype),
        fill_value=FILL,
    )


def values(shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(1, 6)),
    st.integers(1, 30),
    st.sampled_from(["uint16", "float16", "float32", "float64"]),
)
def test_zarr_reads_it(shape: tuple[int, int, int], chunk_tokens: int, dtype: str) -> None:
    files: dict[str, zarr.core.buffer.Buffer] = {}
    array = declare(MemoryStore(files), shape, chunk_tokens, dtype)
    expected = values(shape, dtype)
    shard = b"".join(ShardEncoder(expected, chunk_tokens, FILL))
    files["c/0/0/0"] = zarr.core.buffer.cpu.Buffer.from_bytes(shard)
    np.testing.assert_array_equal(array[:], expected)


@pytest.mark.parametrize(("n_tokens", "chunk_tokens"), [(12, 4), (11, 4), (3, 4)])
def test_tensorstore_reads_it(tmp_path: Path, n_tokens: int, chunk_tokens: int) -> None:
    shape = (3, n_tokens, 5)
    declare(LocalStore(tmp_path), shape, chunk_tokens, "uint16")
    expected = values(shape, "uint16")
    (tmp_path / "c/0/0").mkdir(parents=True)
    shard = b"".join(ShardEncoder(expected, chunk_tokens, FILL))
    (tmp_path / "c/0/0/0").write_bytes(shard)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    read = tensorstore.open(spec, read=True).result().read().result()
    np.testing.assert_array_equal(read, expected)


def test_zarr_would_have_written_the_same_chunks() -> None:
    files: dict[str, zarr.core.buffer.Buffer] = {}
    shape = (4, 12, 5)
    expected = values(shape, "uint16")
    declare(MemoryStore(files), shape, 4, "uint16")[:] = expected
    theirs = files["c/0/0/0"].to_bytes()
    ours = b"".join(ShardEncoder(expected, 4, FILL))
    assert sorted(chunks_of(ours)) == sorted(chunks_of(theirs))


def chunks_of(shard: bytes) -> list[bytes]:
    """Return the chunks that the index of a shard of three names."""
    index, checksum = shard[-52:-4], shard[-4:]
    assert google_crc32c.value(index).to_bytes(4, "little") == checksum
    return [shard[start : start + n] for start, n in struct.iter_unpack("<QQ", index)]


def test_no_more_than_a_chunk_is_held() -> None:
    parts = ShardEncoder(values((4, 100, 5), "uint16"), 10, FILL)
    assert all(len(part) <= 4 * 10 * 5 * 2 + 16 + 4 + 200 for part in parts)


def test_the_disk_is_told_of_chunks_that_are_there_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = values((4, 5, 6), "uint16")
    parts = [*ShardEncoder(bits, 1, FILL)]
    (tmp_path / "shard").write_bytes(b"".join(parts))
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *span: told.append(span), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", "soon", raising=False)
    starts = [0, *itertools.accumulate(map(len, parts))]
    middle = [start + len(part) // 2 for start, part in zip(starts, parts, strict=False)]
    at_hand = {*starts, middle[0], middle[1], middle[3]}

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if flags == "now" and offset not in at_hand:
            raise BlockingIOError
        return read(descriptor, buffers, offset)

    read = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "RWF_NOWAIT", "now", raising=False)
    options = {"shape": (1, 4, 6), "dtype": bits.dtype, "fill": FILL}
    with ShardFile(LocalFiles(tmp_path), "shard", n_chunks=5, **options) as shard:
        shard.will_read([])
        shard.will_read([0, 2, 1, 3])
        assert told == []  # the others are taken to be there, too
        spans = [(starts[chunk], len(parts[chunk]), "soon") for chunk in range(4)]
        for chunks in ([0, 2, 3], [2, 3], [3, 2]):
            shard.will_read(chunks)
            assert told == [spans[chunk] for chunk in chunks]
            told.clear()
        shard._index[1] = [2**64 - 1, 2**64 - 1]  # was left out
        shard._index[2] = [starts[2], 10**9]  # is not in the file
        shard._index[3] = [0, 0]  # to the system it would be all of the file
        told.clear()
        shard.will_read([1, 2, 3])
        assert told == []
        monkeypatch.delattr(os, "RWF_NOWAIT")
        shard.will_read([0])
        assert told == spans[:1]  # of a system that cannot say nothing is known
        told.clear()
        monkeypatch.setattr(tuning, "TUNING", dataclasses.replace(tuning.TUNING, told_bytes=10))
        shard.will_read([0])
        assert [n_bytes for _, n_bytes, _ in told] == [10] * (starts[1] // 10) + [starts[1] % 10]


@pytest.mark.parametrize("n_axes", [1, 2, 3, 4, 5])
def test_the_bytes_are_those_of_an_array_of_any_rank(n_axes: int) -> None:
    shape = (3, 7, 2, 5, 3)[:n_axes]
    files: dict[str, zarr.core.buffer.Buffer] = {}
    of_rows = (3, 4, *shape[2:])[:n_axes], (3, 8, *shape[2:])[:n_axes]
    order = tuple(DEFAULT.order(n_axes))
    array = zarr.create_array(
        MemoryStore(files),
        shape=shape,
        chunks=of_rows[0],
        shards=of_rows[1],
        dtype="uint16",
        filters=[TransposeCodec(order=order)],
        compressors=chunk_codecs("uint16"),
        fill_value=FILL,
    )
    expected = values(shape, "uint16")
    flat = expected.reshape(3, 7 if n_axes > 1 else 1, -1)
    shard = b"".join(ShardEncoder(flat, 4 if n_axes > 1 else 1, FILL))
    files["c" + "/0" * n_axes] = zarr.core.buffer.cpu.Buffer.from_bytes(shard)
    np.testing.assert_array_equal(array[...], expected)


@pytest.mark.parametrize("dtype", ["int64", "float64", "bool", "uint8"])
def test_zarr_reads_a_vector(dtype: str) -> None:
    files: dict[str, zarr.core.buffer.Buffer] = {}
    array = zarr.create_array(
        MemoryStore(files),
        shape=(17,),
        chunks=(17,),
        dtype=dtype,
        compressors=chunk_codecs(dtype),
    )
    expected = np.arange(17).astype(dtype)
    content = encode_vector(expected)
    files["c/0"] = zarr.core.buffer.cpu.Buffer.from_bytes(content)
    np.testing.assert_array_equal(array[:], expected)
    np.testing.assert_array_equal(decode_vector(content, 17, np.dtype(dtype)), expected)


@pytest.mark.parametrize("n_numbers", [3, 12])
@pytest.mark.parametrize("codec", COMPRESSIONS)
def test_a_chunk_of_more_or_fewer_numbers_is_refused(codec: str, n_numbers: int) -> None:
    compression = COMPRESSIONS[codec]
    encoded = np.frombuffer(compression.encode(np.arange(6, dtype="<u2").reshape(1, 6, 1)), "u1")
    with pytest.raises(ValueError, match="hold"):
        compression.decode(encoded, (1, n_numbers, 1), np.dtype("<u2"), np.empty)
