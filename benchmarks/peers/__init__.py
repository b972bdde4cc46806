"""The same work by other tools: the notebook, memmap, h5py, zarr with Dask, TensorStore, and us.

`python -m benchmarks.peers` measures every (peer, task) as a whole process. Each peer is a module
that solves the tasks of `inputs.TASKS` as well as its tool lets it; `by_hand` holds the arithmetic
that those share which read arrays piece by piece in a loop.
"""
