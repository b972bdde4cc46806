"""All commands: help, usage, errors and progress."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import thimble_zarr
from tests.support.commands import fails, succeeds
from thimble_zarr.cli.main import cli
from thimble_zarr.experiment.config import TrainingConfig


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [None, *cli.commands])
def test_help_is_shown(flag: str, command: str | None) -> None:
    text = succeeds(*([] if command is None else [command]), flag).stdout
    assert text.startswith("Usage: ")
    for name in cli.commands if command is None else ():
        assert f"\n  {name} " in text


def test_the_commands_are_these() -> None:
    names = {"train", "demo", "plan", "check", "info", "tokens", "import", "export"}
    names |= {"verify", "repair", "summary", "report", "view", "diff", "recode", "publish", "fetch"}
    assert set(cli.commands) == names


def test_the_list_of_commands_cuts_no_description_off() -> None:
    text = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout
    assert all(f"\n  {name} " in text for name in cli.commands)
    assert "..." not in text.partition("\nCommands:\n")[2]


def test_every_option_of_every_command_is_explained() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_every_setting_is_an_option_and_its_default_is_told(command: str) -> None:
    text = " ".join(succeeds(command, "--help").stdout.split())
    for setting in dataclasses.fields(TrainingConfig):
        assert f"--{setting.name.replace('_', '-')} " in text
        if setting.default is not None and not isinstance(setting.default, bool):
            assert f"[default: {setting.default}]" in text


def test_an_error_of_the_system_is_its_file_and_reason(trained: Path, tmp_path: Path) -> None:
    message = fails(3, "check", trained, "--format=csv", f"--output={tmp_path}")
    assert message == f"Error: {tmp_path}: Is a directory"


def test_the_exit_codes_are_told() -> None:
    text = " ".join(succeeds("--help").stdout.split())
    for code in (
        "0 all is well",
        "1 a check found",
        "2 wrong usage",
        "3 a store",
        "130 interrupted",
    ):
        assert code in text


def test_the_version_is_told() -> None:
    assert thimble_zarr.__version__ in succeeds("--version").stdout


def test_help_starts_without_torch() -> None:
    code = (
        "import sys\nfrom thimble_zarr.cli.main import cli\n"
        "for args in (['-h'], ['train', '-h'], ['check', '-h'], ['tokens', '-h']):\n"
        "    cli(args, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'xarray', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("args", [["nothing"], ["train"], ["check"], ["info", "--nothing", "x"]])
def test_what_click_refuses_is_usage(args: list[str]) -> None:
    fails(2, *args)


@pytest.mark.usefixtures("shown_at_once")
@pytest.mark.parametrize(
    ("args", "doing"),
    [
        (["check", "STORE"], "checking"),
        (["check", "STORE", "STORE", "--tokens=dead,live"], "checking"),
        (["verify", "STORE"], "verifying"),
        (["repair", "STORE"], "verifying"),
        (["export", "STORE", "run.safetensors"], "exporting"),
        (["import", "FILE", "imported.zarr"], "importing"),
    ],
)
def test_commands_say_what_they_are_doing_unless_they_are_quiet(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], doing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "notebook.safetensors"
    succeeds("export", trained, file)
    places = {"STORE": trained, "FILE": file}
    args = [str(places.get(arg, arg)) for arg in args]
    lines = succeeds(*args).stderr.splitlines()
    assert lines
    assert all(line.startswith(f"{doing}: ") for line in lines)
    (tmp_path / "run.safetensors").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "imported.zarr", ignore_errors=True)
    quiet = succeeds(*args, "--quiet")
    assert quiet.stderr == ""
    is_result = args[0] in ("check", "verify", "repair")
    assert bool(quiet.stdout) == is_result
