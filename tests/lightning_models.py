"""A LightningModule that knows nothing of this package, its data, and a trainer without side effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import GPT2_TARGETS, LLAMA_TARGETS, random_batch, tiny_gpt2, tiny_llama, with_lora
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def tiny_peft_model(kind: str, **options: object) -> nn.Module:
    """A fresh, identical tiny PEFT model at each call."""
    if kind == "llama":
        return with_lora(tiny_llama(), LLAMA_TARGETS, **options)
    return with_lora(tiny_gpt2(), GPT2_TARGETS, **options)


class ForeignModule(LightningModule):
    """Somebody's project: the PEFT model sits two attributes deep."""

    def __init__(self, kind: str = "llama", fail_at_step: int | None = None, **options: object) -> None:
        super().__init__()
        self.network = nn.ModuleDict({"language": tiny_peft_model(kind, **options)})
        self.fail_at_step = fail_at_step
        self.losses: list[float] = []

    @property
    def model(self) -> Any:
        return self.network["language"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.fail_at_step is not None and self.global_step == self.fail_at_step:
            raise RuntimeError("the machine went down")
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches(Dataset):
    """Ready-made batches, one per index."""

    def __init__(self, count: int, rows: int = 4, rank: int | None = None, world_size: int = 1) -> None:
        self.batches = []
        for index in range(count):
            batch = random_batch(index, batch=rows, padded=False)
            # Every second row is padded alike, so that shards hold equally many targets.
            for name, padding in (("attention_mask", 0), ("labels", -100)):
                batch[name][1::2, 4:] = padding
            if rank is not None:
                share = rows // world_size
                batch = {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()}
            self.batches.append(batch)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


def loader(count: int = 4, **options: Any) -> DataLoader:
    """A loader of ready-made batches in a fixed order."""
    return DataLoader(Batches(count, **options), batch_size=None)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet CPU trainer that logs nothing and saves nothing unless asked."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**settings, **options})


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every LoRA tensor by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items() if "lora" in name}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise equality of two LoRA states."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
