"""A store made of the notebook's file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.notebook_file import float32_states, import_notebook, live_mask, save
from tests.support.peak import linux_only, measured
from tests.support.runs import N_LIVE, N_STEPS, N_TOKENS, record, token_labels
from thimble_zarr import TokenLabels
from thimble_zarr.errors import ConfigError, NotAStoreError, StoreExistsError
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.sources.importing import import_file
from thimble_zarr.sources.open import open_file_alone
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

N_ROWS = N_STEPS + 1

MB = 10**6


def test_an_import_holds_what_the_run_held(tmp_path: Path, file: Path) -> None:
    reader = import_notebook(file, tmp_path / "run.zarr")
    source = open_file_alone(file)
    assert reader.schema.to_attribute() == json.loads(json.dumps(source.schema.to_attribute()))
    assert reader.commit.complete
    assert set(reader.schema.dtypes.values()) == {"bfloat16"}
    assert source.narrow_states


def test_a_file_in_the_store_that_would_be_replaced_stays(tmp_path: Path, file: Path) -> None:
    import_notebook(file, tmp_path / "run.zarr")
    inside = file.rename(tmp_path / "run.zarr" / file.name)
    with pytest.raises(ConfigError, match=r"lies in .* which would be replaced"):
        import_file(open_file_alone(inside), tmp_path / "run.zarr", overwrite=True)
    assert inside.exists()


def test_labels_are_kept(tmp_path: Path, file: Path) -> None:
    live = live_mask().numpy()
    labels = TokenLabels(live=live, dead=~live)
    found = import_notebook(file, tmp_path / "run.zarr", labels=labels).read_labels()
    assert found.live is not None
    assert found.dead is not None
    assert found.live.tolist() == live.tolist() == (~found.dead).tolist()
    assert int(found.live.sum()) == N_LIVE


def test_labels_of_another_vocabulary_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=f"has {N_TOKENS} tokens, but {N_TOKENS + 1} values"):
        import_notebook(file, tmp_path / "run.zarr", labels=token_labels(N_TOKENS + 1))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("at_byte", [0, 5000, 10**9])
def test_an_import_that_fails_leaves_no_store(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    error: BaseException,
    at_byte: int,
) -> None:
    close = StoreWriter.close

    def fail(n_done: int, n_total: int) -> None:
        if n_done > at_byte:
            raise error

    def fail_at_the_end(writer: StoreWriter) -> None:
        close(writer)
        raise error

    monkeypatch.setattr(StoreWriter, "close", fail_at_the_end)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        import_notebook(file, tmp_path / "run.zarr", on_progress=fail)
    assert list(tmp_path.iterdir()) == [file]


def test_an_existing_store_is_kept_unless_overwriting_was_asked_for(
    tmp_path: Path, file: Path
) -> None:
    path = tmp_path / "run.zarr"
    record(path, n_steps=2)
    for source in (file, tmp_path / "nothing"):  # told before the file is looked at
        with pytest.raises(StoreExistsError, match="--overwrite"):
            import_notebook(source, path)
    assert StoreReader.open(path).n_rows == 3
    with pytest.raises(StoreExistsError, match="is not a thimble-zarr store"):
        import_notebook(file, file, overwrite=True)
    with pytest.raises(NotAStoreError):
        import_notebook(tmp_path / "nothing", path, overwrite=True)
    assert StoreReader.open(path).n_rows == 3
    assert import_notebook(file, path, overwrite=True).n_rows == N_ROWS


def test_progress_ends_with_everything(
    tmp_path: Path, file: Path, tensors: dict[str, torch.Tensor]
) -> None:
    real = save(tmp_path / "float32.safetensors", float32_states(tensors))
    for index, source in enumerate((file, real)):
        told: list[tuple[int, int]] = []
        store = tmp_path / f"{index}.zarr"
        reader = import_notebook(source, store, on_progress=lambda *n: told.append(n))  # noqa: B023
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]
        told.clear()
        export_notebook(
            reader,
            tmp_path / f"{index}.safetensors",
            on_progress=lambda *n: told.append(n),  # noqa: B023
        )
        assert told[-1][0] == told[-1][1] == sum(t.nbytes for t in tensors.values())


MEASURE = """
from pathlib import Path
from thimble_zarr.sources.exporting import export_notebook
from tests.support.notebook_file import import_notebook
from thimble_zarr.sources.importing import import_file
from thimble_zarr.sources.open import open_file_alone
small, large, store, again = map(Path, sys.argv[1:])
export_notebook(import_notebook(small, store), again)
found = {"before": peak()}
reader = open_file_alone(large)
for name in reader.schema.dtypes:
    for row in range(0, reader.n_rows, 8):
        reader.read(name, (row, min(row + 8, reader.n_rows)))
found["read"] = peak()
reader = import_notebook(large, store, overwrite=True)
found["import"] = peak()
export_notebook(reader, again, overwrite=True)
found["export"] = peak()
print(json.dumps(found))
"""


@linux_only
def test_memory_is_that_of_a_block(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A sparse file of 500 MB, of which most was never written."""
    small = save(tmp_path / "small.safetensors", tensors)
    shape = (140, 4663, 64)  # times 12 bytes
    big = {"W": "BF16", "grad_W": "BF16", "momentum_W": "F32", "variance_W": "F32"}
    header, offset, scalars = {}, 0, b""
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            content = tensor.numpy().tobytes()
            kind = "F32" if tensor.dtype == torch.float32 else "I64"
            header[name] = {"dtype": kind, "shape": [], "data_offsets": [0, len(content)]}
            header[name]["data_offsets"] = [offset, offset + len(content)]
            scalars, offset = scalars + content, offset + len(content)
    for name in ("losses", *big):
        size = 4 * shape[0] if name == "losses" else np.prod(shape) * int(big[name][-2:]) // 8
        kind, of = ("F32", shape[:1]) if name == "losses" else (big[name], shape)
        header[name] = {"dtype": kind, "shape": of, "data_offsets": [offset, offset + int(size)]}
        offset += int(size)
    text = json.dumps(header).encode()
    large = tmp_path / "large.safetensors"
    with large.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + scalars)
        stream.truncate(8 + len(text) + offset)
    assert large.stat().st_size > 500 * MB

    found = measured(MEASURE, small, large, tmp_path / "run.zarr", tmp_path / "again.safetensors")
    assert found["read"] - found["before"] <= 40 * MB
    assert found["import"] - found["before"] <= 200 * MB
    assert found["export"] - found["before"] <= 200 * MB
