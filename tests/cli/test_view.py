"""`view`: what it says, how it ends, and what it says of what cannot be viewed."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.commands import MAIN, START, fails, outcome
from thimble_zarr.cli.view import _has_browser


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_it_prints_where_it_is_and_ends_with_ctrl_c(toy_copy: Path) -> None:
    command = [sys.executable, "-c", START + MAIN, "view", str(toy_copy), "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url, timeout=60) as response:
            assert b"<title>thimble-zarr</title>" in response.read()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "", "Ctrl-C ends it.\n")
    assert toy_copy.with_name("copy.summary.zarr").exists()


def test_what_cannot_be_viewed_is_said(toy_copy: Path, tmp_path: Path) -> None:
    assert "nothing.zarr" in fails(3, "view", tmp_path / "nothing.zarr")
    assert "no parameter" in fails(2, "view", toy_copy, "--parameter", "none")
    assert "token 99" in fails(2, "view", toy_copy, "--group", "mine=99")
    assert "NAME=SUBSET" in outcome("view", toy_copy, "--group", "mine")[2]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in fails(2, "view", toy_copy, "--port", port, "--no-browser")


def test_no_browser_is_opened_where_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert not _has_browser({})
    assert _has_browser({"DISPLAY": ":0"})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _has_browser(dict.fromkeys(set(os.environ) - {"DISPLAY"}, ""))
