"""Every layout: opened in place, imported, checked, and bad files of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from tests.support import layouts
from tests.support.commands import checked, succeeds
from tests.support.layouts import LAYOUTS, N_DIMS, N_STEPS, N_TOKENS, SETTINGS, Trajectory
from tests.support.notebook_file import import_notebook, save
from thimble_zarr import check, diff, open_dataset, open_datatree, summary
from thimble_zarr.bits import decode
from thimble_zarr.errors import (
    ConfigError,
    CorpusError,
    DamagedStoreError,
    NotAStoreError,
    SelectionError,
    ThimbleError,
)
from thimble_zarr.report.html import checks, silent, summed_up, write_report
from thimble_zarr.sources.containers.array import RawArray
from thimble_zarr.sources.open import open_file_alone, open_recording
from thimble_zarr.sources.reader import FileReader

N_ROWS = N_STEPS + 1


@pytest.fixture(scope="module")
def run() -> Trajectory:
    return layouts.trajectory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run: Trajectory) -> Path:
    """A file of each layout, never to be written to."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS.values():
        layout.write(run, folder)
    layouts.flannel((run, layouts.trajectory(seed=1)), folder)
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    found = {path.parent.name: path for path in folder.glob("*/run.safetensors")}
    return found | {path.stem.replace("box_1", "box"): path for path in folder.glob("*.*")}


def expected(run: Trajectory, layout: str, name: str) -> np.ndarray:
    """Return the numbers of a variable that must be read: NaN where the file has none."""
    of = LAYOUTS[layout]
    tensor = run.tensors[name].to(of.dtype).double().numpy().copy()
    if name == "grad":
        tensor[0] = np.nan
    if name != "W":
        tensor[of.n_states :] = np.nan
    return tensor if of.has_all_tokens else tensor[:, run.dead_ids]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read_in_place_and_imported(
    tmp_path: Path, files: dict[str, Path], run: Trajectory, layout: str
) -> None:
    of, in_place = LAYOUTS[layout], open_file_alone(files[layout])
    native = str(of.dtype).removeprefix("torch.")
    assert in_place.schema.dtypes == dict.fromkeys(of.variables, native)
    assert in_place.schema.device == of.device
    for reader in (in_place, import_notebook(files[layout], tmp_path / "run.zarr")):
        assert reader.n_rows == N_ROWS
        ids = np.arange(N_TOKENS) if of.has_all_tokens else run.dead_ids
        assert reader.read_token_ids().tolist() == ids.tolist()
        assert reader.schema.whole_tokens == (None if of.has_all_tokens else N_TOKENS)
        for name in of.variables:
            found = decode(reader.read(name, (0, N_ROWS)), native, np.float64)
            np.testing.assert_array_equal(found, expected(run, layout, name), err_msg=name)
            some = decode(reader.read(name, (3, 11), np.array([7, 2, 2])), native, np.float64)
            np.testing.assert_array_equal(some, found[3:11][:, [7, 2, 2]])
        labels = reader.read_labels()
        assert (labels.dead is not None) is of.has_labels
        if of.has_labels:
            assert labels.dead.tolist() == (~run.live)[ids].tolist()
        _expect_scalars(reader.read_scalars(), run, layout)


def _expect_scalars(scalars: dict[str, np.ndarray], run: Trajectory, layout: str) -> None:
    of = LAYOUTS[layout]
    losses = np.float32([np.nan, *run.losses]) if of.has_losses else np.full(N_ROWS, np.nan)
    np.testing.assert_array_equal(scalars["loss"], losses)
    names = zip(("learning_rate", "weight_decay", "beta1", "beta2", "eps"), SETTINGS, strict=True)
    for ours, theirs in names:
        value = SETTINGS[theirs] if of.has_settings else np.nan
        np.testing.assert_array_equal(scalars[ours], [np.nan, *N_STEPS * [value]], err_msg=ours)


@pytest.mark.parametrize("layout", ["thimble_5", "thimble_7", "thimble_8", "crucible"])
def test_complete_runs_pass_the_exact_check_and_a_change_is_seen(
    tmp_path: Path, run: Trajectory, layout: str
) -> None:
    of = LAYOUTS[layout]
    file = of.write(run, tmp_path)
    import_notebook(file, tmp_path / "run.zarr")
    for path in (file, tmp_path / "run.zarr"):
        (found,) = check(path, workers=1)
        assert found.holds
        assert found.verdict.text.startswith("HOLDS to the bit")
        assert (found.subset, found.n_tokens) == ("dead", N_TOKENS - layouts.N_LIVE)
        assert len(found.numbers["step"]) == of.n_states - 1
    for change, text in ((2**-7, "HOLDS within rounding"), (1.0, "FAILS: from step 5 on")):
        W = run.tensors["W"].clone()
        W[5, run.dead_ids[3], 2] *= 1 + change
        folder = tmp_path / f"{change}"
        folder.mkdir()
        file = of.write(replace(run, tensors={**run.tensors, "W": W}), folder)
        (found,) = check(file, workers=1)
        assert found.verdict.text.startswith(text)


def test_a_parameter_of_real_size_passes_the_exact_check(tmp_path: Path) -> None:
    W = torch.nn.Parameter(torch.randn(10_000, 64).mul(0.02).bfloat16())
    optimizer = torch.optim.AdamW([W], lr=1e-2, weight_decay=0.1)
    zero = torch.zeros_like(W)
    rows = {name: [zero] for name in layouts.VARIABLES} | {"W": [W.detach().clone()]}
    for _ in range(3):
        W.grad = torch.randn(10_000, 64).bfloat16()
        optimizer.step()
        now = {"W": W, "grad": W.grad, **optimizer.state[W]}
        for name in rows:
            rows[name].append(now[name].detach().clone())
    tensors = {name: torch.stack(of) for name, of in rows.items()}
    with h5py.File(tmp_path / "thimble_7.h5", "w") as file:
        for name, theirs in zip(rows, ("W", "g", "m", "v"), strict=True):
            chunks = (3, 10_000, 64)
            file.create_dataset(theirs, data=layouts.bits(tensors[name]), chunks=chunks)
        file.attrs.update(SETTINGS)
    (found,) = check(tmp_path / "thimble_7.h5", workers=1)
    assert found.verdict.text.startswith("HOLDS to the bit: ")
    assert {of.total for of in found.replay.values()} == {3 * 640_000}


def test_what_lost_bits_cannot_hold_and_says_why(files: dict[str, Path]) -> None:
    (found,) = check(files["thimble_6"], workers=1)
    assert not found.holds
    assert "It cannot hold: the file keeps W, grad_W, momentum_W, variance_W as float16" in (
        found.verdict.text
    )


def test_a_run_of_another_device_may_differ_and_says_so(files: dict[str, Path]) -> None:
    for layout, where in (("thimble_8", "it was"), ("thimble_7", "it may have been")):
        (found,) = check(files[layout], replay="torch", workers=1)
        assert f"{where} recorded on Apple's MPS" in found.to_json()["not_exact_because"]


@pytest.mark.parametrize("layout", ["thimble_9", "movie", "box"])
def test_weights_alone_are_summed_up_and_not_checked(
    tmp_path: Path, run: Trajectory, layout: str
) -> None:
    file = LAYOUTS[layout].write(run, tmp_path)
    moved = open_dataset(file).moved.compute()
    before, after = (decode(layouts.bits(of), "bfloat16") for of in _changes(run, layout))
    np.testing.assert_array_equal(moved[1:], before != after)
    numbers = summary(file, workers=1)
    np.testing.assert_array_equal(numbers.n_moved[1:], (before != after).sum(axis=2))
    with pytest.raises(SelectionError, match="were not recorded"):
        check(file)


def _changes(run: Trajectory, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    W = run.tensors["W"]
    W = W if LAYOUTS[layout].has_all_tokens else W[:, run.dead_ids]
    return W[:-1], W[1:]


def test_weights_alone_make_a_report(tmp_path: Path, run: Trajectory) -> None:
    file = layouts.movie(run, tmp_path)
    write_report(file, tmp_path / "movie.html")
    assert "movie.safetensors" in (tmp_path / "movie.html").read_text()


def test_each_run_of_a_file_of_several_is_opened(
    tmp_path: Path, files: dict[str, Path], run: Trajectory
) -> None:
    readers = open_recording(files["flannel"])
    assert [reader.schema.parameter for reader in readers] == ["run_0", "run_1"]
    for name in layouts.VARIABLES:
        bits = readers[0].read(name, (1, N_ROWS))
        np.testing.assert_array_equal(bits, layouts.bits(run.tensors[name][1:]))
    alone = save(tmp_path / "W.safetensors", {"W": torch.stack(2 * [run.tensors["W"]])})
    assert [of.schema.dtypes for of in open_recording(alone)] == 2 * [{"W": "bfloat16"}]
    other = readers[1].read("W", (0, N_ROWS))
    assert (other[0] == readers[0].read("W", (0, 1))[0]).all()
    assert (other[1:] != readers[0].read("W", (1, N_ROWS))).any()
    loss = readers[0].read_scalars()["loss"]
    expected = torch.tensor(run.losses).bfloat16().double().tolist()
    assert loss[1:].tolist() == expected
    assert [*open_datatree(files["flannel"])] == ["run_0", "run_1"]
    assert check(files["flannel"], workers=1).holds
    numbers = summary(files["flannel"], parameter="run_1", place=tmp_path / "sums", workers=1)
    assert numbers.sizes["step"] == N_ROWS
    with pytest.raises(SelectionError, match=r"holds 2 runs, and one must be chosen.*run_0, run_1"):
        open_dataset(files["flannel"])
    assert open_dataset(files["flannel"], "run_1").attrs["parameter"] == "run_1"
    assert diff(files["thimble_7"], layouts.thimble_8(run, tmp_path)).is_equal


def test_masks_that_are_called_otherwise_label_tokens(
    tmp_path: Path, files: dict[str, Path], run: Trajectory
) -> None:
    live = torch.from_numpy(run.live)
    count = torch.where(live, 5, 0)
    ids = live.nonzero().flatten()
    for number, tensors in enumerate(
        (
            {"trained_mask": live, "untrained_mask": ~live},
            {"untrained_indices": (~live).nonzero().flatten(), "trained_indices": ids},
            {"token_occurrence_counts": count},
        )
    ):
        mask = save(tmp_path / str(number), tensors)
        (reader,) = open_recording(files["box"], token_mask=mask)
        assert reader.read_labels().live.tolist() == run.live.tolist()
        assert (reader.read_labels().count is not None) is (number == 2)
    mask = save(tmp_path / "other", {"trained_mask": live, "untrained_indices": ids})
    with pytest.raises(CorpusError, match="both live and dead, or neither"):
        open_recording(files["box"], token_mask=mask)


def test_a_learning_rate_that_changed_is_told(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 100)
    rates = []
    for _ in range(N_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    file = layouts.thimble_7(layouts.trajectory(lr=lambda step: rates[step - 1]), tmp_path)
    assert not check(file, workers=1).holds
    (tmp_path / "rates.txt").write_text("\n".join(map(repr, rates)))
    for told in ("linear:3e-3:100", str(tmp_path / "rates.txt")):
        (reader,) = open_recording(file, learning_rate=told)
        assert reader.read_scalars()["learning_rate"][1:].tolist() == rates
    assert checked(file, "--learning-rate", "linear:3e-3:100")["holds"] is True
    succeeds("import", file, tmp_path / "run.zarr", "--learning-rate", "linear:3e-3:100", "-q")
    assert check(tmp_path / "run.zarr", workers=1).holds
    for wrong, message in (
        ("fast", "'fast' is no learning rate"),
        ("linear:1e-3", "is no learning rate"),
        ("linear:1e-3:0", "no number of steps"),
        ("linear:1e-3:inf", "no number of steps"),
        ("linear:1e-3:nan", "no number of steps"),
        ("linear:nan:100", "not finite"),
        ("nan", "not finite"),
        (str(file), "cannot read a learning rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_recording(file, learning_rate=wrong)


def test_states_of_the_first_steps_are_summed_up(tmp_path: Path, run: Trajectory) -> None:
    numbers = summary(layouts.crucible(run, tmp_path), workers=1)
    assert np.isfinite(numbers.norm_m_hat[1:9]).all()
    assert np.isnan(numbers.norm_m_hat[9:]).all()
    assert np.isfinite(numbers.norm_delta_W[1:]).all()
    assert np.isfinite(numbers.norm_grad[1:9]).all()


def test_hyper_parameters_that_are_missing_are_said(tmp_path: Path, run: Trajectory) -> None:
    file = layouts.thimble_8(run, tmp_path)
    settings = {"adam_beta1": 0.9, "lr": 0.01, "wd": 0.1}
    (file.parent / "metadata.json").write_text(json.dumps(settings))
    with pytest.raises(SelectionError, match="does not say beta2, eps"):
        check(file, workers=1)
    known = summed_up(str(file), parameter=None, groups=None, stage=silent)
    assert np.isnan(known.run.summary.norm_predicted[:, 1:]).all()
    assert checks([known.run], None, None, lambda n_done, n_parts: None) == [None]
    settings |= {"betas": [0.9, 0.999], "eps": 1e-8}
    (file.parent / "metadata.json").write_text(json.dumps(settings))
    assert check(file.parent, workers=1).holds  # the directory has the file
    (file.parent / "metadata.json").write_text("{")
    with pytest.raises(NotAStoreError, match=r"metadata\.json beside it is not JSON"):
        check(file)


def refused(file: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        FileReader.open_each(file)
    assert str(file) in str(raised.value)


def test_hdf5_files_that_are_not_whole_are_refused(
    tmp_path: Path, files: dict[str, Path], run: Trajectory
) -> None:
    content = files["thimble_7"].read_bytes()
    cut = tmp_path / "cut.h5"
    for n_bytes in (8, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:n_bytes])
        refused(cut, DamagedStoreError, "begins as an HDF5 file, but is not a whole one")
    reader = open_file_alone(layouts.thimble_7(run, tmp_path))
    reader.path.write_bytes(content[: len(content) // 3])
    with pytest.raises(DamagedStoreError, match=r"thimble_7\.h5: it was changed after"):
        [reader.read(name, (0, N_ROWS)) for name in layouts.VARIABLES]
    for options in ({}, {"compression": "gzip"}):
        with h5py.File(cut, "w") as file:
            shape, chunks = (N_ROWS, N_TOKENS, N_DIMS), (4, N_TOKENS, N_DIMS)
            W = file.create_dataset("W", shape, np.uint16, chunks=chunks, **options)
            W[:8] = 1
        refused(cut, DamagedStoreError, "rows of W from 8 on were never written")
    with h5py.File(cut, "w") as file:
        file.create_dataset("W", shape, np.uint16)
    refused(cut, DamagedStoreError, "rows of W from 0 on were never written")


def test_a_flipped_bit_of_hdf5_is_our_error_or_none(tmp_path: Path, files: dict[str, Path]) -> None:
    rng, n_refused = np.random.default_rng(4), 0
    for name in ("thimble_6", "thimble_7"):
        content = files[name].read_bytes()
        for at in rng.integers(0, 12_000, 40):
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(rng.integers(8))
            (tmp_path / "flipped.h5").write_bytes(flipped)
            try:
                for reader in FileReader.open_each(tmp_path / "flipped.h5"):
                    for variable in reader.schema.dtypes:
                        reader.read(variable, (0, reader.n_rows))
            except ThimbleError:
                n_refused += 1
    assert n_refused > 20


def test_chunks_larger_than_memory_are_read_by_their_place(files: dict[str, Path]) -> None:
    reader = open_file_alone(files["thimble_7"])
    for series in reader.run.series.values():
        assert isinstance(series.array, RawArray)
        assert (len(series.array.offsets), series.array.piece_rows) == (3, 5)
    compressed = open_file_alone(files["thimble_6"])
    assert compressed.schema.layout.chunk_tokens == N_TOKENS  # a row is decompressed once


def test_hdf5_cut_in_any_way_is_read(tmp_path: Path, run: Trajectory) -> None:
    W = layouts.bits(run.tensors["W"])
    for number, options in enumerate(
        (
            {},  # contiguous
            {"chunks": (3, 7, 5), "compression": "lzf", "shuffle": True},
            {"chunks": (5, N_TOKENS, N_DIMS), "dtype": ">u2"},
        )
    ):
        with h5py.File(tmp_path / f"{number}.h5", "w", userblock_size=512 * (number == 0)) as file:
            file.create_dataset("embeddings", data=W, **options)
            file["adam_beta1"] = np.float32(0.9)
        reader = open_file_alone(tmp_path / f"{number}.h5")
        np.testing.assert_array_equal(reader.read("W", (0, N_ROWS)), W)
        np.testing.assert_array_equal(reader.read("W", (4, 9), range(3, 20)), W[4:9, 3:20])
        assert reader.read_scalars()["beta1"][1] == 0.9


def test_hdf5_numbers_that_numpy_has_not_are_converted_by_hdf5(
    tmp_path: Path, run: Trajectory
) -> None:
    """Floats of 16 bits with the exponent of float32, and integers within wider ones."""
    W = run.tensors["W"].float().numpy()
    bfloat16, shifted = h5py.h5t.IEEE_F32LE.copy(), h5py.h5t.STD_U16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_size(2)
    shifted.set_precision(12)
    shifted.set_offset(4)
    file = tmp_path / "run.h5"
    for dtype, numbers in ((bfloat16, W), (shifted, layouts.bits(run.tensors["W"]) & 0xFFF)):
        with h5py.File(file, "w") as written:
            space = h5py.h5s.create_simple(W.shape)
            of = h5py.h5d.create(written.id, b"W", dtype, space)
            of.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers)
            h5py.h5d.create(written.id, b"when", h5py.h5t.UNIX_D32LE, space)  # of no dtype
            written.attrs["seed"] = h5py.Empty("f")
        reader = open_file_alone(file)
        np.testing.assert_array_equal(reader.read("W", (0, N_ROWS)).view(numbers.dtype), numbers)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"W": (3, 2, 5, 2), "losses": (3,)}, NotAStoreError, r"losses has shape \(\)"),
        ({"W": (0, 2, 5, 2)}, NotAStoreError, "there is no run in it"),
        (
            {"W": (2, 5, 2), "token_occurrence_counts": (5,)},
            CorpusError,
            "are not counts: whole numbers",
        ),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, arrays: dict[str, tuple[int, ...]], error: type[Exception], message: str
) -> None:
    tensors = {name: torch.full(shape, 0.5) for name, shape in arrays.items()}
    with pytest.raises(error, match=message):
        open_recording(save(tmp_path / "run.safetensors", tensors))


def test_states_of_which_the_first_step_cannot_be_told_are_refused(tmp_path: Path) -> None:
    """As many rows as steps: of steps 1 to N, or of the initial state and all but the last."""
    moments = torch.ones(3, 5, 2)
    tensors = {"W": torch.ones(4, 5, 2), "m": moments}
    assert (
        open_recording(save(tmp_path / "run.safetensors", tensors))[0].run.series["exp_avg"].shift
    )
    moments[0] = 0
    refused(save(tmp_path / "run.safetensors", tensors), NotAStoreError, "m has a row less than W")


def test_hdf5_of_several_runs_is_refused(tmp_path: Path) -> None:
    file, runs = tmp_path / "run.h5", np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    with h5py.File(file, "w") as written:
        W = written.create_dataset("W", runs.shape, np.float32, chunks=(1, 2, 2, 2))
        for run in (2, 0, 1):  # they lie in the order in which they were written
            W[run] = runs[run]
    refused(file, NotAStoreError, r"W has shape \(3, 2, 2, 2\), expected \(step, token, dim\)")


def test_hdf5_that_lies_elsewhere_is_not_read(tmp_path: Path, files: dict[str, Path]) -> None:
    file, shape = tmp_path / "run.h5", (N_ROWS, N_TOKENS, N_DIMS)
    with h5py.File(file, "w") as written:
        written["W"] = h5py.ExternalLink(str(files["thimble_7"]), "/W")
    refused(file, NotAStoreError, "it has no recording")
    with h5py.File(file, "w") as written:
        external = [(str(files["thimble_7"]), 0, h5py.h5f.UNLIMITED)]
        written.create_dataset("W", shape, np.uint16, external=external)
    refused(file, NotAStoreError, "W lies in other files")
    with h5py.File(file, "w") as written:
        layout = h5py.VirtualLayout(shape, np.uint16)
        layout[:] = h5py.VirtualSource(files["thimble_7"], "W", shape)
        written.create_virtual_dataset("W", layout)
    refused(file, NotAStoreError, "W lies in other files")
    with h5py.File(file, "w") as written:
        large = (2**40, 2**10, 2**10)
        written.create_dataset("W", large, np.uint16, chunks=(1, 2**10, 2**10), maxshape=large)
        written["W"][:1] = 1
    refused(file, DamagedStoreError, "rows of W from 1 on were never written")


def test_hdf5_without_h5py_says_what_to_install(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install 'thimble-zarr\[hdf5\]'"):
        check(files["thimble_7"])


def test_tokens_that_nobody_can_name_are_refused(tmp_path: Path, run: Trajectory) -> None:
    W = run.tensors["W"][:, :9]
    dead = torch.from_numpy(~run.live)
    file = save(tmp_path / "run.safetensors", {"W": W, "dead_mask": dead})
    refused(file, NotAStoreError, "W has 9 tokens, and the file says that there are 40")
    ids = torch.arange(20, 2, -2)
    file = save(tmp_path / "run.safetensors", {"W": W, "dead_indices": ids})
    refused(file, NotAStoreError, "not ascending")


def test_what_a_crucible_file_has_of_each_step_is_read_and_imported(
    files: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "run.zarr"
    succeeds("import", files["crucible"], store, "-q")
    missing = np.full((1, N_DIMS), np.nan)
    for path in (files["crucible"], store):
        found = open_dataset(path)
        assert found.h_mean.dims == ("step", "h_mean_0")
        expected = np.concatenate([missing, layouts.hidden_means().numpy()])
        np.testing.assert_array_equal(found.h_mean, expected)
        not_taken = json.loads(found.attrs["thimble"])["attrs"]["source_file"]["not_taken"]
        assert not_taken == "centroid"
    assert diff(files["crucible"], store).is_equal
