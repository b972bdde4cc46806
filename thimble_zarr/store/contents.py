"""What lies at a path: a store or not, of which parameters; and whether one may be put there."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    NotAStoreError,
    SelectionError,
    StoreError,
    StoreExistsError,
    ThimbleError,
    UnsupportedFormatError,
    listed,
)
from thimble_zarr.format.location import Location, on_disk
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    PARAMETERS,
    Json,
    Schema,
    TokenLabels,
    check_group_name,
)
from thimble_zarr.format.versions import upgrade
from thimble_zarr.store.files.base import Files, NotPlainFileError, OutsideError, read_document
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.place import files_at
from thimble_zarr.store.keys import COMMIT, LEDGER, LOCK, metadata_key
from thimble_zarr.store.ledger import Commit
from thimble_zarr.store.lock import recording_of

StorePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Contents:
    """What the root of a store says of it.

    `groups` are those of its parameters in the order of the recording; a single one may be the root
    itself, whose group is empty and whose name is `parameter`, where it is known.
    """

    files: Files
    groups: tuple[str, ...]
    parameter: str | None = None

    @classmethod
    def read(cls, files: Files) -> Self:
        """Read the root of a store.

        Raises NotAStoreError if there is none, UnsupportedFormatError or DamagedStoreError if it
        cannot be read.
        """
        if not files.is_there:
            raise NotAStoreError(f"there is nothing at {files.path}; check the path")
        attribute = read_attribute(files) if _is_inside(files, COMMIT) else None
        if attribute is None:
            raise NotAStoreError(
                f"{files.path} is not a thimble-zarr store; "
                "record one with `thimble-zarr train` or `thimble_zarr.Recorder`"
            )
        with reading(files.path):
            content = upgrade(attribute)
            groups = _names(content.get(PARAMETERS, ()))
        parameter = content.get("parameter")
        return cls(files, groups or ("",), None if groups or parameter is None else str(parameter))

    def choose(self, parameter: str | None) -> str:
        """Return the group of a parameter, by default of the only one there is.

        Raises SelectionError if it is not there, or none was chosen of several.
        """
        is_alone = len(self.groups) == 1
        names = listed(self.groups, most=24, hint=" (`thimble-zarr info` lists them all)")
        if is_alone and parameter in (None, self.parameter or self.groups[0] or None):
            return self.groups[0]
        if parameter and parameter in self.groups:
            return parameter
        if parameter is None:
            raise SelectionError(
                f"{self.files.path} holds {len(self.groups)} parameters, and one must be chosen, "
                "by `parameter=` in Python or --parameter on the command line: "
                f"{names}"
            )
        there = names or self.parameter or "one without a name"
        raise SelectionError(f"{self.files.path} has no parameter {parameter}; there is {there}")


@contextmanager
def reading(node: Location) -> Iterator[None]:
    """Name the group of which something cannot be read."""
    try:
        yield
    except (UnsupportedFormatError, DamagedStoreError, ConfigError) as error:
        kind = DamagedStoreError if isinstance(error, ConfigError) else type(error)
        raise kind(f"cannot read {node}: {error}") from error


def _names(names: Json) -> tuple[str, ...]:
    if not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise DamagedStoreError(f"its parameters must be names, not {names!r}")
    for name in map(str, names):
        check_group_name(name)
    return tuple(map(str, names))


def read_attribute(files: Files, group: str = "") -> Json:
    """Return the `thimble` attribute of a group, None where there is none."""
    try:
        attribute: Json = read_document(files, metadata_key(group))["attributes"][ATTRIBUTE]
        return attribute
    except OutsideError as error:
        raise DamagedStoreError(str(error)) from error
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {files.path / group}: {error.strerror}") from error


def read_declared(path: StorePath) -> Schema | None:
    """Return what is declared of the first parameter of a store, be anything committed or not.

    None where nothing is: there is no store, or its writer was killed as soon as it began. Raises
    UnsupportedFormatError or DamagedStoreError if what is declared cannot be read.
    """
    files = files_at(path)
    if read_attribute(files) is None:
        return None
    group = Contents.read(files).groups[0]
    attribute = read_attribute(files, group)
    with reading(files.path / group):
        return None if attribute is None else Schema.from_attribute(attribute)


def why_empty(path: StorePath) -> str:
    """Return why nothing is committed in a store, as far as that is known, and what to do."""
    schema = None
    with suppress(StoreError):
        schema = read_declared(path)
    is_imported = schema is not None and schema.is_imported
    return recording_of(files_at(path)).why_empty(is_imported=is_imported)


def is_begun(path: StorePath) -> bool:
    """Return whether there is anything at `path` but a store without a row: perhaps a recording."""
    files = LocalFiles(on_disk(path))
    return not files.is_vacant and not is_without_rows(files)


def is_without_rows(files: Files) -> bool:
    """Return whether it is a store, perhaps not wholly declared, that never had a commit."""
    if not has_file(files, LOCK):
        return False
    try:
        return Commit.read(files).n_rows == 0
    except DamagedStoreError:
        return not has_file(files, COMMIT) and not (has_file(files, LEDGER) and files.size(LEDGER))


def check_vacant(path: StorePath, *, overwrite: bool) -> None:
    """Raise StoreExistsError unless a store may be created at `path`.

    An empty directory is vacant; with `overwrite` so is a store, also one whose writer was killed
    before it was wholly declared. Nothing else ever is.
    """
    files = LocalFiles(on_disk(path))
    if files.is_vacant:
        return
    if read_attribute(files) is None and not is_without_rows(files):
        raise StoreExistsError(
            f"{path} exists and is not a thimble-zarr store, so it is never overwritten; "
            "choose another path"
        )
    if not overwrite:
        raise StoreExistsError(
            f"{path} already holds a recorded run; choose another path, or overwrite it "
            "(--overwrite, or overwrite=True)"
        )


def by_group(
    schema: Schema | Mapping[str, Schema],
    labels: TokenLabels | Mapping[str, TokenLabels] | None,
) -> tuple[dict[str, Schema], dict[str, TokenLabels]]:
    """Return what is known of each parameter, by its group; the one at the root has no name."""
    schemas = {"": schema} if isinstance(schema, Schema) else schema
    return (
        {group: replace(one, parameter=group) if group else one for group, one in schemas.items()},
        {"": labels} if isinstance(labels, TokenLabels) else dict(labels or {}),
    )


def check_schemas(schemas: Mapping[str, Schema], labels: Mapping[str, TokenLabels]) -> None:
    """Raise ConfigError unless a store can hold all parameters with their labels."""
    lengths = {schema.layout.block_steps for schema in schemas.values()}
    if len(lengths) != 1:
        raise ConfigError(
            f"all parameters of a store need blocks of the same length, not {sorted(lengths)} steps"
        )
    for group, schema in schemas.items():
        if group or len(schemas) > 1:
            check_group_name(group)
        schema.check_json()
        if group in labels:
            schema.check_labels(labels[group])


def has_file(files: Files, key: str) -> bool:
    """Return whether there is a file."""
    try:
        files.size(key)
    except (FileNotFoundError, NotADirectoryError, NotPlainFileError):
        return False
    return True


def _is_inside(files: Files, key: str) -> bool:
    """Return whether a file would lie in the store, and not behind a link."""
    try:
        files.size(key)
    except (OSError, ValueError) as error:  # of others whoever needs it says what is wrong
        return not isinstance(error, OutsideError)
    return True


@contextmanager
def disk_errors_named(what: str, remedy: str) -> Iterator[None]:
    """Let errors of the disk say what could not be done, and what helps."""
    try:
        yield
    except ThimbleError:
        raise
    except OSError as error:
        raise StoreError(f"cannot {what}: {error.strerror or error}; {remedy}") from error
