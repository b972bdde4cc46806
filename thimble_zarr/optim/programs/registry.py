"""Which program an optimizer has."""

from collections.abc import Mapping

from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import UnsupportedFormatError
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.programs.program import PortableProgram


def program_of(optimizer: Optimizer, dtypes: Mapping[str, str]) -> PortableProgram | None:
    """Return the newest program of an optimizer whose arrays have these native dtypes.

    None if there is none: where its arithmetic is that of tensors (`capturable`,
    `differentiable`, a learning rate or betas that are tensors), where arrays are of several dtypes
    or not of one that a store holds, and where torch's own program does not do what it should
    (fused SGD in 16 bits): `Optimizer.kernel`.

    Examples
    --------
    >>> from thimble_zarr.optim.specs.adam import Adam
    >>> adamw = Adam(name="AdamW", implementation="single", decoupled_weight_decay=True)
    >>> dtypes = dict.fromkeys(("W", "grad", "exp_avg", "exp_avg_sq"), "bfloat16")
    >>> program_of(adamw, dtypes).name
    'adamw-single/1'
    """
    natives = {*dtypes.values()}
    if len(natives) != 1 or not natives <= {*NATIVE_DTYPES}:
        return None
    (native,) = natives
    kernel = optimizer.kernel(native)
    return None if kernel is None else PortableProgram(kernel, optimizer, native)


def program_named(name: str, optimizer: Optimizer, dtypes: Mapping[str, str]) -> PortableProgram:
    """Return the program of a name, with its version, to read what was made with it.

    Raises
    ------
    UnsupportedFormatError
        If this release does not know it, or not for such an optimizer.
    """
    program = program_of(optimizer, dtypes)  # every program has one version
    if program is None or program.name != name:
        known = "none" if program is None else program.name
        raise UnsupportedFormatError(
            f"the store was made with the program {name} of {optimizer.name}, and this release "
            f"knows {known}; read it with a newer thimble-zarr"
        )
    return program
