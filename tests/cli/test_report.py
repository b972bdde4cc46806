"""`report`: what it writes and where, and what it says."""

import os
from pathlib import Path

import pytest

from tests.support.commands import fails, outcome, succeeds
from thimble_zarr.report import html
from thimble_zarr.report.panels.loss import loss


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reports of this file go, of one panel each, which is quick."""
    monkeypatch.setattr(html, "PANELS", (loss,))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_is_named_after_its_run_and_says_how_large_it_is(
    here: Path, toy_copy: Path
) -> None:
    exit_code, stdout, stderr = outcome("report", toy_copy, "-q")
    assert (exit_code, stderr) == (0, "")
    size = (here / "copy.html").stat().st_size
    assert stdout == f"copy.html, {size / 1e6:.2f} MB\n"
    page = (here / "copy.html").read_text(encoding="utf-8")
    assert "dead: HOLDS to the bit" in page
    assert "<title>copy.zarr</title>" in page


def test_what_is_checked_and_shown_can_be_chosen(here: Path, toy_copy: Path) -> None:
    options = ("--group", "few=0,1", "-o", "a.html")
    succeeds("report", toy_copy, "--check", "live", *options)
    page = (here / "a.html").read_text(encoding="utf-8")
    assert "live: HOLDS to the bit" in page
    assert '<th scope="row">few</th>' in page
    succeeds("report", toy_copy, "--check", "none", *options)
    assert "HOLDS" not in (here / "a.html").read_text(encoding="utf-8")


def test_several_stores_are_one_page(here: Path, toy_path: Path, toy_copy: Path) -> None:
    succeeds("report", toy_path, toy_copy, "--check", "none")
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "<title>copy.zarr, run.zarr</title>" in page


def test_panels_are_written_as_pictures(here: Path, toy_copy: Path) -> None:
    result = succeeds("report", toy_copy, "--format", "png")
    assert result.stdout == "copy, 3 pictures of dead, live, all\n"
    assert (here / "copy" / "live" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_or_meant_is_said_before_anything_is_done(
    here: Path, toy_path: Path
) -> None:
    (here / "folder").mkdir()
    (here / "file").touch()
    assert "it is a directory" in fails(3, "report", toy_path, "-o", "folder")
    assert "it is a file" in fails(3, "report", toy_path, "--format", "png", "-o", "file")
    assert "no directory nowhere" in fails(3, "report", toy_path, "-o", "nowhere/run.html")
    assert "not NAME=SUBSET" in fails(2, "report", toy_path, "--group", "thai")
    assert "none.zarr" in fails(3, "report", here / "none.zarr")
    assert not (here / "run.html").exists()


def test_a_place_that_forbids_writing_is_said_before_anything_is_done(
    here: Path, toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write
    monkeypatch.setattr(html, "summed_up", None)
    assert "cannot write run.html: permission denied" in fails(3, "report", toy_path)
    assert "cannot write a.csv: permission" in fails(3, "check", toy_path, "--output", "a.csv")


def test_of_a_store_of_several_parameters_one_is_chosen(here: Path, zoo: object) -> None:
    line = fails(2, "report", zoo.path, "--check", "none")
    assert "wte.weight" in line
    succeeds("report", zoo.path, "--parameter", "norm", "--check", "none", "-o", "norm.html")
    assert "norm, 131" in (here / "norm.html").read_text(encoding="utf-8")
