"""Options, words and exit codes that several commands share."""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

from thimble_zarr.errors import AuditError, StoreError
from thimble_zarr.experiment.config import CHOICES, HELP, TrainingConfig
from thimble_zarr.experiment.optimizers import OWN, default_in_words, without_others
from thimble_zarr.format.location import Url, located

FOUND, USAGE, UNREADABLE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143
"""Exit codes: the worse, the higher."""


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    if isinstance(error, AuditError):
        return FOUND
    return USAGE if isinstance(error, ValueError | TypeError | FileExistsError) else UNREADABLE


_PATH: Any = click.Path(path_type=Path)


class _Store(click.Path):
    """A path, or the address of a store on a server."""

    def convert(self, value: Any, *context: Any) -> Any:
        location = located(value)
        return location if isinstance(location, Url) else super().convert(value, *context)


LOCATION = _Store(path_type=Path)

STORE = click.argument("store", type=LOCATION)
STORES = click.argument("stores", metavar="STORE...", nargs=-1, required=True, type=LOCATION)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print only results, warnings and errors.")
OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Replace the store at that path, but never anything else."
)
TOKEN_MASK = click.option(
    "--token-mask",
    type=_PATH,
    help="Safetensors file with live_mask or dead_mask, for a file that does not have them.",
)
LEARNING_RATE = click.option(
    "--learning-rate",
    metavar="RATE",
    help="The learning rate of a file that does not say it, or in which it changed: a number, "
    "linear:PEAK:STEPS, which falls to 0, or a file with a number for each step.",
)
PARAMETERS = click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME",
    help='Only this parameter, or those that match a pattern such as "*.weight"; may be repeated.  '
    "[default: all]",
)


def _named_groups(
    ctx: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, str]:
    """Read `NAME=SUBSET`, of which there may be several."""
    groups = {}
    for value in values:
        name, equals, subset = value.partition("=")
        if not (name and equals and subset):
            raise click.BadParameter(f"{value!r} is not NAME=SUBSET, such as thai=@ids.txt")
        groups[name] = subset
    return groups


GROUPS = click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=SUBSET",
    callback=_named_groups,
    help="A group of tokens besides dead, live and all: ids such as rare=17,42, a file of ids "
    "(thai=@ids.txt), or the=text:the; may be repeated.",
)


def format_option(*formats: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option `--format`, a table by default."""
    kind = click.Choice(formats)
    return click.option(
        "--format", "format_", type=kind, default="table", show_default=True, help=help
    )


def size(text: str) -> int:
    """Read a number of bytes, such as 256MiB."""
    from dask.utils import parse_bytes

    try:
        n_bytes: int = parse_bytes(text or "nothing")
    except ValueError:
        n_bytes = 0
    if n_bytes < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 256MiB")
    return n_bytes


PROCESS_MEMORY = click.option(
    "--memory",
    "memory_bytes",
    type=size,
    help="Limits the memory of all processes together.  [default: four fifths of what is free]",
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="How many processes compute, if they fit into the memory.  [default: one for each CPU]",
)


def check_directory(file: Path) -> None:
    """Raise StoreError if there is no directory for a file, or nothing can be written into it."""
    directory = file.absolute().parent
    if not directory.is_dir():
        raise StoreError(f"cannot write {file}: there is no directory {file.parent}")
    if not os.access(file if file.exists() else directory, os.W_OK):
        raise StoreError(f"cannot write {file}: permission denied; name another place")


MEMORY = click.option(
    "--memory",
    type=size,
    help="Limits the recorder's memory (minimum: one step) and so determines the block length.  "
    "[default: 256MiB, or 512MiB with --coding predicted]",
)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every setting of `TrainingConfig`, and `--config`."""
    for setting in reversed(fields(TrainingConfig)):
        name, default = setting.name, setting.default
        flag, help_ = f"--{name.replace('_', '-')}", HELP[name]
        kind: Any = (get_args(setting.type) or [setting.type])[0]  # of `Path | None` the first
        if kind is bool:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        elif default is not None:
            help_ += f"  [default: {default}]"
        if name in OWN and (its := default_in_words(name)):
            help_ += f"  [default: {its}]"
        if name in CHOICES:
            kind = click.Choice(CHOICES[name])
        elif kind is Path:
            kind = _PATH
        command = click.option(flag, type=kind, default=None, help=help_)(command)
    return click.option(
        "--config",
        type=_PATH,
        help="TOML file of settings, named as the options: batch_size = 16. Options win.",
    )(command)


def config_from(
    config: Path | None, flags: dict[str, object], recorded: TrainingConfig | None = None
) -> TrainingConfig:
    """Return settings: those recorded, else defaults; overridden by a file, and that by flags."""
    from thimble_zarr.experiment.config import read_toml

    kept = {} if recorded is None else recorded.to_json()
    file = {} if config is None else read_toml(config)
    given = {name: value for name, value in flags.items() if value is not None}
    asked = {**file, **given}
    kept = without_others(kept, asked.get("optimizer", kept.get("optimizer")))
    return TrainingConfig.from_settings(kept | asked)
