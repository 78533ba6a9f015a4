"""One fit of a comparison: trained as ``na-lora fit`` trains it, and scored."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

from na_lora_lightning.callbacks.gate_callback import gate_callbacks
from na_lora_lightning.compare.forgetting import FixedText, other_text, own_answers
from na_lora_lightning.compare.last_layers import BlockInputs
from na_lora_lightning.compare.measuring import RecordLosses, record_losses
from na_lora_lightning.compare.plan import Cell, Options, Plan
from na_lora_lightning.errors import ConfigurationError, NonFiniteError
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.modules.language import NALoRALightningModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GATE_CURVES = ("gate_mask_density", "gate_responsiveness", "step_scale", "step_scale_deviation")


@dataclass
class Fit:
    """What ``na-lora fit`` makes of a configuration, before it trains.

    Attributes:
        trainer: Trains.
        module: Is trained.
        datamodule: The data.
    """

    trainer: Trainer
    module: NALoRALightningModule
    datamodule: LightningDataModule


class BaseModels:
    """The base model of a worker, read once; each fit gets modules of its own around the same weights.

    Args:
        last_layers: The number of blocks that train, where these are the last ones alone.
        cache: Folder for what these blocks are given.
    """

    def __init__(self, last_layers: int | None, cache: Path) -> None:
        self._last_layers, self._cache = last_layers, cache
        self._key: tuple[BaseModelSource, str] | None = None
        self._model: PreTrainedModel | None = None

    def load(self, source: BaseModelSource, device: torch.device) -> PreTrainedModel:
        """The model with the weights that the former fit had, which are frozen."""
        if self._model is None or self._key != (source, device.type):
            self._model = load_base_model(source, device).requires_grad_(False)
            self._key = (source, device.type)
        shared = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        model: PreTrainedModel = copy.deepcopy(self._model, shared)
        if self._last_layers is not None:
            name = f"{source}:{next(model.parameters()).dtype}"
            BlockInputs(self._cache, self._last_layers, name).attach(model)
        return model

    def load_apart(self, source: BaseModelSource, device: torch.device) -> PreTrainedModel:
        """The same with weights of its own, for LoRA whose start changes them."""
        if self._last_layers is not None:
            raise ConfigurationError(
                "LoRA that starts by changing weights does not go with --last-layers; leave it out."
            )
        return copy.deepcopy(self.load(source, device))


class CellScorer:
    """Trains and scores the cells of a comparison in this process.

    Args:
        plan: What is compared.
        make_fit: Makes trainer, module and data of a configuration of ``na-lora fit``.
        cache: Folder for the inputs of the last blocks, where they alone train.
    """

    def __init__(self, plan: Plan, make_fit: Callable[[Options], Fit], cache: Path) -> None:
        self._plan = plan
        self._make_fit = make_fit
        self._cache = cache
        self._bases = BaseModels(plan.last_layers, cache)
        self._other_text: FixedText | None = None
        # Of the last task alone, as what the base model says to it takes memory.
        self._answers: tuple[Any, FixedText | None] = (None, None)

    def score(self, cell: Cell) -> dict[str, Any]:
        """Trains a cell.

        Returns:
            ``validation`` and ``test`` (nats per target token; infinite where training diverged), the losses of the
            test records (``test_sums``, ``test_tokens``), forgetting (``other_loss``, ``base_other_loss``,
            ``other_kl``, and ``own_loss``, ``base_own_loss``, ``own_kl`` on what the base model itself answers, where
            the data has prompts), ``seconds`` of training (of the processor on a CPU, of the clock elsewhere),
            ``peak_memory`` (bytes; None on a CPU), ``steps``, ``parameters``, ``gates`` (means over the sites) and
            ``device``.

        Raises:
            ConfigurationError: The arm cannot be trained.
        """
        config = self._plan.config(cell)
        fit = self._make_fit(config)
        module, trainer = fit.module, fit.trainer
        changes_base = module.lora.changes_base_weights
        module.load_base = self._bases.load_apart if changes_base else self._bases.load
        try:
            return self._trained_and_measured(cell, fit)
        finally:
            module.model = None
            del fit, module, trainer
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _trained_and_measured(self, cell: Cell, fit: Fit) -> dict[str, Any]:
        device = fit.trainer.strategy.root_device
        is_cuda = device.type == "cuda"
        if is_cuda:
            # It has no peak to reset before it has begun.
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
        clock = time.perf_counter if is_cuda else time.process_time
        begun = clock()
        try:
            fit.trainer.fit(fit.module, datamodule=fit.datamodule)
            seconds, diverged = clock() - begun, False
        except NonFiniteError:
            seconds, diverged = clock() - begun, True
        result: dict[str, Any] = {
            "seconds": seconds,
            "peak_memory": torch.cuda.max_memory_allocated(device) if is_cuda else None,
            "steps": fit.trainer.global_step,
            "parameters": fit.module.peft_model.get_nb_trainable_parameters()[0],
            "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
            "gates": _gates(fit.trainer),
        }
        if diverged:
            return {**result, "validation": math.inf, "test": math.inf, "test_sums": [], "test_tokens": []}
        model = fit.module.peft_model.to(device).eval()
        validation, test = self._splits(fit, model, device)
        with fit.trainer.precision_plugin.forward_context():
            result |= self._forgotten(cell, fit, model, device)
        return {
            **result,
            "validation": validation.mean,
            "test": test.mean,
            "test_sums": test.sums,
            "test_tokens": test.tokens,
        }

    def _forgotten(self, cell: Cell, fit: Fit, model: Any, device: torch.device) -> dict[str, float]:
        tokenizer = getattr(fit.datamodule, "tokenizer", None)
        if tokenizer is None:
            raise ConfigurationError("the data has no tokenizer, with which forgetting is measured; use text data.")
        source = fit.module.source

        def load_base() -> Any:
            return self._bases.load(source, device).to(device).eval()  # type: ignore[arg-type]

        key = (source, device.type, str(fit.trainer.precision))
        if self._other_text is None:
            self._other_text = other_text(tokenizer, self._plan.other_text)
        texts = {"other": self._other_text}
        if self._answers[0] != (cell.task, key):
            batches = fit.datamodule.val_dataloader()
            own = own_answers(batches, load_base, str(key), device, self._cache)
            self._answers = ((cell.task, key), own)
        if self._answers[1] is not None:
            texts["own"] = self._answers[1]
        found: dict[str, float] = {}
        for name, text in texts.items():
            of_model, of_base, kl = text.measure(model, load_base, device, key)
            found |= {f"{name}_loss": of_model, f"base_{name}_loss": of_base, f"{name}_kl": kl}
        return found

    def _splits(self, fit: Fit, model: Any, device: torch.device) -> tuple[RecordLosses, RecordLosses]:
        """Losses on validation and test data; without test data, the records of validation take turns."""
        data = fit.datamodule
        has_test = data.sources["test"] is not None if hasattr(data, "sources") else True
        with fit.trainer.precision_plugin.forward_context():
            data.setup("validate")
            validation = record_losses(model, data.val_dataloader(), device)
            if not has_test:
                return validation.part(0, 2), validation.part(1, 2)
            data.setup("test")
            return validation, record_losses(model, data.test_dataloader(), device)


def _gates(trainer: Trainer) -> dict[str, float]:
    """Means over the gate sites of what the mechanisms measured last; empty for arms without them."""
    callbacks = gate_callbacks(trainer)
    controller = callbacks[0].controller if callbacks else None
    if controller is None:
        return {}
    return {name: float(values.mean()) for name, values in controller.mechanisms.metrics().items()}
