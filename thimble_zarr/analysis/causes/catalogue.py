"""The catalogue of causes: what can be wrong with a record, in the order in which it is asked.

One small function a cause (`places`, `amounts`); its docstring is the message. A failure is put
before each, and the first that explains it is the cause.
"""

from thimble_zarr.analysis.causes import amounts, places
from thimble_zarr.analysis.causes.cause import Cause

CAUSES: tuple[Cause, ...] = tuple(
    one for module in (places, amounts) for one in vars(module).values() if isinstance(one, Cause)
)
"""In the order in which they are written down: those that prove themselves to the bit first."""
