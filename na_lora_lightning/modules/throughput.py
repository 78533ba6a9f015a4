"""Training speed in tokens per second."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.labels import IGNORED_LABEL


class ThroughputCallback(Callback):
    """Logs how many tokens this process trains on per second of wall-clock time.

    ``train/tokens_per_second`` counts the tokens that are not padding in ``input_ids`` (attention mask not 0, or none);
    ``train/target_tokens_per_second`` those of them that the loss is computed on (labels not -100 from the second
    position on). Both are sums over the training batches since the last report, divided by the time from that report
    to this one less the time in validation; waiting for data, the optimizer, callbacks and checkpoints count. A report
    comes every ``log_every_n_steps`` optimizer steps of the trainer and at the end of an epoch, and waits for the
    device to finish its work. Counts are of one process: times the number of processes for the whole run.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._target_tokens: Tensor | int = 0
        self._since = 0.0
        self._paused_at = 0.0
        self._reported_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._restart(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused_at = perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock go on."""
        self._since += perf_counter() - self._paused_at

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and reports when it is time to."""
        # Stays on the device: reading a number from it would make every step wait.
        mask = batch.get("attention_mask")
        self._tokens = self._tokens + (batch["input_ids"].numel() if mask is None else (mask != 0).sum())
        self._target_tokens = self._target_tokens + (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
        steps = trainer.global_step - self._reported_step
        # The trainer has the number from its logger connector, unknown to type checkers.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # At the trainer's own logging steps, which a resumed run shares with an uninterrupted one.
        if steps and (trainer.global_step % every == 0 or trainer.is_last_batch):
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tokens, target_tokens = float(self._tokens), float(self._target_tokens)
        seconds = perf_counter() - self._since
        for name, count in (("tokens", tokens), ("target_tokens", target_tokens)):
            pl_module.log(
                f"train/{name}_per_second",
                count / seconds,
                prog_bar=name == "tokens",
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._tokens = self._target_tokens = 0
        self._since = perf_counter()
        self._reported_step = trainer.global_step
