"""A LightningModule that knows nothing of this package, its data and trainer, and what holds for callbacks in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from packaging.version import Version
from tiny_models import GPT2_TARGETS, LLAMA_TARGETS, random_batch, tiny_gpt2, tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from vision_helpers import IMAGE_TOKEN, picture, tiny_vlm_model, tiny_vlm_processor, tiny_vlm_tokenizer

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.models.targets import lora_targets

# The processor of Qwen2-VL takes no other tokenizer before transformers 5.
VISION_KINDS = (
    ("llava", "idefics3", "qwen2_vl") if Version(version("transformers")).major >= 5 else ("llava", "idefics3")
)


def tiny_peft_model(kind: str, **options: object) -> nn.Module:
    """A fresh, identical tiny PEFT model at each call; of a model for images with LoRA on all of its parts."""
    if kind in VISION_KINDS:
        model: Any = tiny_vlm_model(kind, tiny_vlm_tokenizer(kind))
        return with_lora(model, "all-linear", exclude_modules=lora_targets(model).exclude_modules, **options)
    if kind == "llama":
        return with_lora(tiny_llama(), LLAMA_TARGETS, **options)
    return with_lora(tiny_gpt2(), GPT2_TARGETS, **options)


def image_batch(kind: str, numbers: Sequence[int]) -> dict[str, Tensor]:
    """What a real processor makes of one picture and a text for each number, longer for even ones."""
    processor = tiny_vlm_processor(kind)
    texts = ["abcdefgh" if number % 2 == 0 else "abc" for number in numbers]
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    batch: Any = processor(
        text=[processor.apply_chat_template(message) for message in messages],
        images=[[picture(number)] for number in numbers],
        padding=True,
        return_tensors="pt",
    )
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[kind])
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == image_token)
    return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}


class ForeignModule(LightningModule):
    """Somebody's project: the PEFT model sits two attributes deep."""

    def __init__(self, kind: str = "llama", fail_at_step: int | None = None, **options: object) -> None:
        super().__init__()
        self.network = nn.ModuleDict({"language": tiny_peft_model(kind, **options)})
        self.kind = kind
        # With it the callbacks find the gates of an image encoder.
        self.example_inputs = image_batch(kind, [0, 1]) if kind in VISION_KINDS else None
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

    def __init__(
        self, count: int, rows: int = 4, rank: int | None = None, world_size: int = 1, kind: str = "llama"
    ) -> None:
        self.batches = []
        share = rows // world_size
        own = range(rows) if rank is None else range(rank * share, (rank + 1) * share)
        if kind in VISION_KINDS:
            self.batches = [image_batch(kind, [index * rows + row for row in own]) for index in range(count)]
            return
        for index in range(count):
            batch = random_batch(index, batch=rows, padded=False)
            # Every second row is padded alike, so that shards hold equally many targets.
            for name, padding in (("attention_mask", 0), ("labels", -100)):
                batch[name][1::2, 4:] = padding
            self.batches.append({name: value[own.start : own.stop] for name, value in batch.items()})

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


def hooks_of(module: nn.Module) -> list[int]:
    """Number of hooks on each submodule; transformers puts some of its own on vision towers."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()]


class RowWatch(Callback):
    """Checks at each batch that masked rows stay and kept rows move, and that none moves without an optimizer step."""

    def __init__(self, importance: GateImportanceCallback) -> None:
        self.importance = importance
        self.before: list[Tensor] = []
        self.steps_before = 0
        self.masked = 0

    @property
    def _controller(self) -> Any:
        assert self.importance.controller is not None
        return self.importance.controller

    def _rows(self) -> list[Tensor]:
        return [site.parameters()[0].parameter.detach()[site.rows].clone() for site in self._controller.gates]

    def on_train_batch_start(self, *args: Any) -> None:
        self.before, self.steps_before = self._rows(), self._controller.steps

    def on_train_batch_end(self, *args: Any) -> None:
        weights = self._controller.weights
        moved = torch.cat([(a != b).any(dim=1) for a, b in zip(self._rows(), self.before, strict=True)])
        stepped = self._controller.steps > self.steps_before
        assert torch.equal(moved, (weights > 0) & stepped)
        self.masked += int((weights == 0).sum()) * stepped


def both(**options: Any) -> list[Any]:
    """Both callbacks, with masks that change."""
    importance = GateImportanceCallback(0.5, warmup_steps=2, refresh_every=2, **options)
    return [importance, StepScaleCallback(granularity="channel", **options)]


@cache
def fitted_alone(kind: str = "llama") -> dict[str, Tensor]:
    """What a fit with fresh callbacks gives."""
    module = ForeignModule(kind)
    make_trainer(Path(), callbacks=both()).fit(module, loader(kind=kind))
    return lora_state(module)


def check(
    folder: Path,
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], Any] = loader,
    make_others: Callable[[], list[Callback]] = list,
    example_inputs: Any = None,
    **options: Any,
) -> tuple[Any, GateImportanceCallback]:
    """Fits three times: watching alone is bitwise plain LoRA, and masked rows stay at each optimizer step."""
    plain, watched, masked = make_module(), make_module(), make_module()
    make_trainer(folder, callbacks=make_others(), **options).fit(plain, make_data())
    watching: list[Callback] = [
        GateImportanceCallback(keep_fraction=1.0, warmup_steps=0, example_inputs=example_inputs),
        StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0, example_inputs=example_inputs),
    ]
    make_trainer(folder, callbacks=[*make_others(), *watching], **options).fit(watched, make_data())
    assert_equal_states(lora_state(plain), lora_state(watched))
    importance = GateImportanceCallback(0.25, warmup_steps=0, refresh_every=1, example_inputs=example_inputs)
    watch = RowWatch(importance)
    trainer = make_trainer(folder, callbacks=[*make_others(), importance, watch], **options)
    trainer.fit(masked, make_data())
    controller: Any = importance.controller
    assert controller.steps > 0
    assert watch.masked == controller.steps * controller.gates.channels * 3 // 4
    assert masked.global_step == trainer.global_step
    if masked.automatic_optimization:
        assert controller.steps == importance._mechanism.steps == trainer.global_step  # type: ignore[union-attr]
    assert hooks_of(masked) == hooks_of(plain)
    return masked, importance
