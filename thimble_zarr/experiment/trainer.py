"""The training loop: Thimble 1 as an ordinary user of the recorder."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.checkpoints import Checkpoint, Checkpoints, RecordedRun
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.corpus import read_corpus
from thimble_zarr.experiment.device import choose_compute_dtype, find_device
from thimble_zarr.experiment.model import (
    build_model,
    build_optimizer,
    build_optimizer_of_others,
    embedding,
    language_loss,
)
from thimble_zarr.experiment.vocabulary import count_tokens, encode, label_tokens, read_tokenizer
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.layout import default_memory_bytes
from thimble_zarr.format.location import Url
from thimble_zarr.format.schema import Json, TokenLabels
from thimble_zarr.record.audit.audit import OnFinding
from thimble_zarr.record.recorder import Recorder
from thimble_zarr.record.writer_thread import Keep
from thimble_zarr.store.reader import StorePath
from thimble_zarr.store.remote.spool import publish_rest

PARAMETER = "transformer.wte.weight"


def sliding_batches(
    ids: np.ndarray, *, seq_len: int, batch_size: int, seed: int, n_skipped: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and next tokens, for ever: int64, shape `(batch, seq_len)`.

    Windows are views of the corpus; all that is made for an epoch is its order, 4 bytes a window.
    The order is that of `torch.utils.data.DataLoader` with `shuffle=True` and a generator of this
    seed, as in the original notebook. The last batch of an epoch may be smaller. The first
    `n_skipped` batches are left out, and none of them is read. Raises CorpusError if the corpus is
    shorter than one window and its last target.
    """
    n_windows = len(ids) - seq_len
    if n_windows < 1:
        raise CorpusError(
            f"the corpus has {len(ids)} tokens, and one sequence takes {seq_len + 1}; "
            "use a longer text or a smaller --seq-len"
        )
    return _epochs(torch.from_numpy(ids).unfold(0, seq_len + 1, 1), batch_size, seed, n_skipped)


def _epochs(
    windows: Tensor, batch_size: int, seed: int, n_skipped: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    n_batches = -(-len(windows) // batch_size)
    while True:
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # DataLoader's worker seed
        order = _shuffled(len(windows), generator)
        for batch in range(n_skipped, n_batches):
            indices = order[batch * batch_size : (batch + 1) * batch_size]
            chunk = windows[indices.long()].long()
            yield chunk[:, :-1], chunk[:, 1:]
        del order  # before the next one is drawn
        n_skipped = max(0, n_skipped - n_batches)
        _shuffled(len(windows), generator)  # drawn by RandomSampler as it ends


def _shuffled(n: int, generator: torch.Generator) -> Tensor:
    """Return a random order of `range(n)`: the one of `torch.randperm`, in half of its bytes."""
    dtype = torch.int32 if n < 2**31 else torch.int64
    return torch.randperm(n, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, by name; `attrs`, which is kept with the run, says where it is from."""

    corpus_name: str
    ids: np.ndarray
    labels: TokenLabels
    attrs: dict[str, Json]


@dataclass(frozen=True)
class Progress:
    """The steps a run has taken, the loss of the last one in nats, and the bytes on disk.

    `audited` is how many steps were audited, None without an audit.
    """

    step: int
    loss: float
    bytes_written: int
    audited: AuditCounts | None = None


def load_data(config: TrainingConfig) -> TrainingData:
    """Read corpus, tokenizer and mask as the config says, and encode the corpus."""
    corpus = read_corpus(config.corpus)
    tokenizer = read_tokenizer(config.tokenizer, vocab_size=config.vocab_size)
    checksum = hashlib.sha256()
    ids = encode(tokenizer, corpus.chunks(checksum))
    tokenizer_json: str = tokenizer.to_str()
    attrs: dict[str, Json] = {
        "corpus": {"name": corpus.name, "sha256": checksum.hexdigest(), "n_tokens": len(ids)},
        "tokenizer": {
            "name": str(config.tokenizer or "trained on the Python standard library"),
            "sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        },
    }
    labels = label_tokens(tokenizer, count_tokens(tokenizer, ids), mask_file=config.token_mask)
    return TrainingData(corpus.name, ids, labels, attrs)


class Training:
    """A model being trained: one call of `step` is one optimizer step.

    `config` has the compute dtype that is used, also where `auto` was asked for, and the global
    random seed is set from it. `optimizer`, one of the `optimizers`, is that of the embedding. A
    checkpoint says where to resume, after step `start`. Raises ConfigError, CorpusError or
    ResumeError if device, corpus or checkpoint do not fit.
    """

    def __init__(
        self, config: TrainingConfig, data: TrainingData, checkpoint: Checkpoint | None = None
    ) -> None:
        config = replace(config, compute_dtype=choose_compute_dtype(config).name)
        self.config = config
        self.start = 0 if checkpoint is None else checkpoint.step
        self._device = find_device(config.device)
        self._batches = sliding_batches(
            data.ids,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            n_skipped=self.start,
        )
        torch.manual_seed(config.seed)
        self.model = build_model(config, self._device)
        self.optimizer = build_optimizer(self.model, config)
        others = build_optimizer_of_others(self.model, config)
        self.optimizers = (self.optimizer,) if others is None else (self.optimizer, others)
        self.embedding = embedding(self.model)
        if checkpoint is not None:
            checkpoint.restore(self.model, *self.optimizers)

    def step(self) -> float:
        """Take one optimizer step and return its loss."""
        inputs, targets = (tokens.to(self._device) for tokens in next(self._batches))
        loss = language_loss(self.model, inputs, targets, self.config)
        torch.autograd.backward(loss)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def train(
    config: TrainingConfig,
    data: TrainingData,
    store: StorePath,
    *,
    memory_bytes: int | None = None,
    audit: OnFinding | None = None,
    audit_every_step: bool = False,
    keep: Keep = "all",
    overwrite: bool = False,
    resume: bool = False,
    url: Url | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Train as the config says and record what it says, every step by default.

    `data` are what `load_data` returns for the config. However training ends, by itself, by an
    error or by Ctrl-C, the recorded steps are on disk and the store is closed. Until the last step
    there are checkpoints beside the store to resume from, unless a schedule leaves out steps.
    `audit`, `audit_every_step` and `keep` are the recorder's. With a `url` the store is published
    there while it is recorded. Returns whether all of it is, and True without a `url`.

    With `resume` an existing store is resumed from its last checkpoint: it ends as the store of an
    uninterrupted run, bit for bit. Where nothing was committed, it starts from the beginning.
    Raises ResumeError if the store is not one of this config and these data, or its checkpoints do
    not fit it.
    """
    checkpoints, checkpoint = Checkpoints(store), None
    memory_bytes = memory_bytes or default_memory_bytes(config.coding)
    if resume and (run := RecordedRun.read(store)) is not None:
        config = run.resolve(config)
        run.check_same(config, {"memory_bytes": memory_bytes, **data.attrs})
        if run.is_finished:
            checkpoints.clear()  # it may have been killed before it did
            return publish_rest(store, url)
        run.check_has(checkpoints)
        checkpoint = checkpoints.newest(run.committed_step)
    training = Training(config, data, checkpoint)
    how: dict[str, Any] = {"keep": keep, "overwrite": overwrite, "resume": resume}
    how |= {"audit": audit, "audit_every_step": audit_every_step, "memory_bytes": memory_bytes}
    how |= _what_to_record(config, data) | ({"spool": store} if url else {})
    with Recorder(
        url or store,
        training.optimizer,
        parameter=training.embedding,
        **how,
        attrs={"config": training.config.to_json(), "memory_bytes": memory_bytes, **data.attrs},
        after_step=training.start if resume else None,
    ) as recorder:
        for progress in _recorded_steps(training, recorder, checkpoints):
            on_step(progress)
    checkpoints.clear()
    return recorder.is_published


def _what_to_record(config: TrainingConfig, data: TrainingData) -> dict[str, Any]:
    return {
        "name": PARAMETER,
        "labels": data.labels,
        "variables": config.recorded_variables,
        "tokens": getattr(data.labels, config.record_tokens, None),  # no label says all
        "schedule": config.schedule,
        "n_steps": config.steps,
        "coding": config.coding,
    }


def _recorded_steps(
    training: Training, recorder: Recorder, checkpoints: Checkpoints
) -> Iterator[Progress]:
    """Take and record steps, and a checkpoint now and then as a block is full."""
    checkpoints.clear(after_step=training.start)  # of a run that was overwritten, or went on
    block_steps, config = recorder.schemas[""].layout.block_steps, training.config
    for step in range(recorder.next_step, config.steps + 1):
        loss = training.step()
        recorder.log(loss=loss)
        is_full = (step + 1) % block_steps == 0
        if config.schedule is None and is_full and checkpoints.is_due:
            checkpoints.take(step, training.model, *training.optimizers)
            checkpoints.prune(recorder.committed_step)
        yield Progress(step, loss, recorder.bytes_written, recorder.audited)
