"""Movies: the weights of a run, and little else, in a safetensors file.

`W` of shape (N+1, V, D), or (N+1, n, D) of the n dead tokens of `dead_mask`; `losses` of shape
(N,), of which `losses[k]` is of step k+1; no hyper-parameters. Every file whose arrays have known
names, and which no other layout has, is read alike, with what states it has.
"""

from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import has_weights, single_run

LAYOUT = Layout("a safetensors file", has_weights, single_run)
