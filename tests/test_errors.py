import inspect

from thimble_zarr import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_is_a_thimble_error_and_a_builtin() -> None:
    for cls in CLASSES:
        assert issubclass(cls, errors.ThimbleError)
        if cls is not errors.ThimbleError:
            builtins = {base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"}
            assert builtins - {"Exception", "BaseException", "object"}


def test_the_tree_in_the_docstring_names_every_error() -> None:
    for cls in CLASSES:
        assert f"{cls.__name__}" in (errors.__doc__ or "")
