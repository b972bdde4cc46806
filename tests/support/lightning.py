"""A small module for Lightning, and what trains it. The import takes seconds: tests ask late."""

from pathlib import Path

import pytorch_lightning
import torch
from torch import nn

from thimble_zarr.integrations.lightning import ThimbleCallback


class Module(pytorch_lightning.LightningModule):
    """An embedding and a linear layer."""

    def __init__(self, *, fused: bool = False, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 11)
        self.fused, self.fails_at = fused, fails_at
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if index == self.fails_at:
            raise OSError("the corpus is gone")
        loss = nn.functional.cross_entropy(self.head(self.embedding(batch[0])), batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


def fit(module: Module, callback: ThimbleCallback, directory: Path, **options: object) -> None:
    tokens = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(7))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)
    pytorch_lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(directory),
        **options,
    ).fit(module, data)
