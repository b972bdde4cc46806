import pytest
from hypothesis import given
from hypothesis import strategies as st

from thimble_zarr.format.layout import (
    DEFAULT_MEMORY_BYTES,
    MAX_BLOCK_STEPS,
    SCALAR_CHUNK_STEPS,
    TARGET_CHUNK_BYTES,
    RowSize,
    human_bytes,
    plan_layout,
    plan_layouts,
    plan_storage,
    recorder_memory_bytes,
    split_range,
)

ITEMSIZES = dict.fromkeys(("W", "grad", "exp_avg", "exp_avg_sq"), 2)

shapes = st.tuples(st.integers(1, 200_000), st.integers(1, 4096))
budgets = st.integers(1, 2**34)


@given(shapes, st.sampled_from([2, 4, 8]), budgets)
def test_a_block_is_the_longest_that_fits(
    shape: tuple[int, int], itemsize: int, budget: int
) -> None:
    sizes = dict.fromkeys(ITEMSIZES, itemsize)
    block_steps = plan_layout(*shape, sizes, memory_bytes=budget).block_steps
    assert (
        block_steps == 1 or recorder_memory_bytes([RowSize(*shape, sizes)], block_steps) <= budget
    )
    longer_fits = recorder_memory_bytes([RowSize(*shape, sizes)], 2 * block_steps) <= budget
    assert block_steps == MAX_BLOCK_STEPS or not longer_fits


@given(shapes, budgets)
def test_chunks_cover_the_tokens_and_keep_their_size(shape: tuple[int, int], budget: int) -> None:
    n_tokens, n_dims = shape
    layout = plan_layout(n_tokens, n_dims, ITEMSIZES, memory_bytes=budget)
    assert 1 <= layout.chunk_tokens <= n_tokens
    covered = layout.shard_tokens(n_tokens)
    assert n_tokens <= covered < n_tokens + layout.chunk_tokens
    one_token = layout.block_steps * n_dims * 2
    assert layout.chunk_tokens * one_token <= 2 * max(TARGET_CHUNK_BYTES, one_token)


@given(shapes, budgets)
def test_a_block_lies_in_one_chunk_of_scalars(shape: tuple[int, int], budget: int) -> None:
    assert SCALAR_CHUNK_STEPS % plan_layout(*shape, ITEMSIZES, memory_bytes=budget).block_steps == 0


@given(st.lists(st.tuples(shapes, st.sampled_from([2, 4, 8])), min_size=1, max_size=5), budgets)
def test_several_parameters_share_a_block_and_the_bound(
    sizes: list[tuple[tuple[int, int], int]], budget: int
) -> None:
    rows = [RowSize(*shape, dict.fromkeys(ITEMSIZES, itemsize)) for shape, itemsize in sizes]
    layouts = plan_layouts(rows, memory_bytes=budget)
    (block_steps,) = {layout.block_steps for layout in layouts}
    assert block_steps == 1 or recorder_memory_bytes(rows, block_steps) <= budget
    longer_fits = recorder_memory_bytes(rows, 2 * block_steps) <= budget
    assert block_steps == MAX_BLOCK_STEPS or not longer_fits
    buffers = sum(2 * block_steps * row.n_bytes for row in rows)
    assert recorder_memory_bytes(rows, block_steps) >= buffers


def test_thimble_1_as_measured() -> None:
    plan = plan_storage(1001, 10_000, 64, ITEMSIZES, n_scalars=8)
    assert (plan.layout.block_steps, plan.layout.chunk_tokens) == (16, 65)
    assert plan.memory_bytes <= DEFAULT_MEMORY_BYTES
    assert plan.array_bytes["W"] == 1001 * 10_000 * 64 * 2
    assert 0 < plan.disk_bytes - 4 * plan.array_bytes["W"] < 4 * 10**6


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 100))
def test_split_range_cuts_at_multiples(start: int, stop: int, length: int) -> None:
    parts = list(split_range(start, stop, length))
    assert [i for part in parts for i in range(*part)] == list(range(start, stop))
    assert all(end % length == 0 for _, end in parts[:-1])
    assert all(end - begin <= length for begin, end in parts)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_994, "999.99 kB"),
        (999_995, "1.00 MB"),
        (7_690_000_000, "7.69 GB"),
        (999_996_000_000, "1.00 TB"),
        (512_006_410_000_000, "512.01 TB"),
        (3 * 10**15, "3.00 PB"),
        (4 * 10**20, "400.00 EB"),
    ],
)
def test_sizes_have_the_unit_that_keeps_them_short(n_bytes: int, text: str) -> None:
    assert human_bytes(n_bytes) == text
