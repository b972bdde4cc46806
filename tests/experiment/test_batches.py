from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support.peak import linux_only, measured
from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.trainer import sliding_batches


def notebook_batches(
    ids: np.ndarray, *, seq_len: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as the original notebook makes them: a DataLoader, begun again at each end."""
    corpus = torch.tensor(ids, dtype=torch.long)
    dataset = [
        (corpus[start : start + seq_len], corpus[start + 1 : start + seq_len + 1])
        for start in range(max(0, len(corpus) - seq_len))
    ]
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        num_workers=0,
    )
    while True:
        yield from iter(loader)


def distinct_ids(n: int) -> np.ndarray:
    """No two tokens alike, so that a window tells where it was cut."""
    return np.arange(100, 100 + n, dtype=np.int64)


@pytest.mark.parametrize(
    ("n_windows", "batch_size"),
    [(23, 5), (20, 5), (3, 7), (7, 1), (1, 1), (5, 5)],
    ids=["last-smaller", "last-full", "epoch-below-batch", "ones", "one-window", "one-batch"],
)
def test_batches_are_those_of_the_notebooks_dataloader_over_epochs(
    n_windows: int, batch_size: int
) -> None:
    ids = distinct_ids(n_windows + 4)
    n_batches = 4 * -(-n_windows // batch_size)  # four epochs
    options = {"seq_len": 4, "batch_size": batch_size, "seed": 42}
    ours = list(islice(sliding_batches(ids, **options), n_batches))
    theirs = list(islice(notebook_batches(ids, **options), n_batches))
    for step, (batch, expected) in enumerate(zip(ours, theirs, strict=True), start=1):
        for tokens, expected_tokens in zip(batch, expected, strict=True):
            assert tokens.dtype == torch.int64
            assert tokens.tolist() == expected_tokens.tolist(), f"step {step}"


def test_another_seed_is_another_order() -> None:
    ids = distinct_ids(30)
    first, second = (
        next(sliding_batches(ids, seq_len=4, batch_size=26, seed=seed))[0].tolist()
        for seed in (1, 2)
    )
    assert first != second
    assert sorted(first) == sorted(second)


def test_every_epoch_has_every_window_once() -> None:
    batches = sliding_batches(distinct_ids(27), seq_len=4, batch_size=5, seed=0)
    orders = []
    for _ in range(3):
        epoch = [inputs for inputs, _ in islice(batches, 5)]
        assert [len(inputs) for inputs in epoch] == [5, 5, 5, 5, 3]
        orders.append([row[0] for inputs in epoch for row in inputs.tolist()])
    assert [sorted(order) for order in orders] == 3 * [list(range(100, 123))]
    assert orders[0] != orders[1] != orders[2]


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    next(sliding_batches(distinct_ids(27), seq_len=4, batch_size=5, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_corpus_is_not_copied() -> None:
    ids = distinct_ids(27)
    batches = sliding_batches(ids, seq_len=4, batch_size=5, seed=0)
    ids[:] = 7
    assert set(next(batches)[0].flatten().tolist()) == {7}


def test_a_corpus_of_one_window_and_its_last_target_is_enough() -> None:
    batches = sliding_batches(distinct_ids(5), seq_len=4, batch_size=3, seed=0)
    for inputs, targets in islice(batches, 2):
        assert inputs.tolist() == [[100, 101, 102, 103]]
        assert targets.tolist() == [[101, 102, 103, 104]]


@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_shorter_corpus_is_refused_before_the_first_batch(n: int) -> None:
    with pytest.raises(CorpusError, match=rf"has {n} tokens, and one sequence takes 5"):
        sliding_batches(distinct_ids(n), seq_len=4, batch_size=3, seed=0)


SECOND_EPOCH = """
import numpy as np
from thimble_zarr.experiment.trainer import sliding_batches
ids = np.arange(5_000_000, dtype=np.int32)
next(sliding_batches(ids[:10], seq_len=4, batch_size=1, seed=0))
before = peak()
next(sliding_batches(ids, seq_len=4, batch_size=1, seed=0, n_skipped=len(ids)))
print(peak() - before)
"""


@linux_only
def test_an_epoch_takes_four_bytes_a_window_and_the_next_one_no_more() -> None:
    order = 4 * 5_000_000
    assert 0.9 * order < measured(SECOND_EPOCH) < 1.5 * order


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_ids_of_any_integer_dtype_make_the_same_batches(dtype: type) -> None:
    options = {"seq_len": 4, "batch_size": 5, "seed": 42}
    ours = sliding_batches(distinct_ids(30).astype(dtype), **options)
    for one, other in zip(
        islice(ours, 9), sliding_batches(distinct_ids(30), **options), strict=False
    ):
        assert one[0].dtype == torch.int64
        assert torch.equal(torch.stack(one), torch.stack(other))
