"""What the LightningModules share: options, optimizer, steps over the mean of their tokens, and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, LossOptions, ScheduleOptions, as_group
from na_lora_lightning.checkpoints.model_card import weights_of
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import attached_trainer, loads_checkpoint
from na_lora_lightning.models.loftq import begin_with_loftq, own_base
from na_lora_lightning.models.saved_adapter import (
    adapter_folder,
    load_adapter,
    lora_of_adapter,
    require_own_base,
    with_tokens_of_adapter,
)
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.modules.adapter import AdapterModule
from na_lora_lightning.modules.losses import StepAverage, TokenSums
from na_lora_lightning.modules.nonfinite import (
    NonFiniteStepWarning,
    SkippedStep,
    StepGuard,
    has_finite_gradients,
    loss_error,
    nonfinite_origin,
)
from na_lora_lightning.modules.optimization import (
    OptimizerFactory,
    describe_optimizer,
    make_optimizer,
    optimizer_factory,
)
from na_lora_lightning.modules.schedules import make_schedule, require_metric, set_rate

if TYPE_CHECKING:
    from peft import PeftModel


class NoTargetTokensWarning(UserWarning):
    """A training batch has no token to compute the loss on."""


class AdapterTrainingModule(AdapterModule, ABC):
    """Trains the adapter of a PEFT model on losses that are sums over tokens, or over whatever has a target.

    Groups of options may be mappings, as a checkpoint's hyper-parameters have them.

    Args:
        source: The base model.
        lora: What the adapter is.
        optimizer: Makes the optimizer from the trainable parameters.
        schedule: Learning rate over the optimizer steps.
        loss: What a step is averaged over, and what is done about losses that are not finite.
        adapter: When and where the adapter is written as a PEFT folder.
        gradient_checkpointing: Recompute activations in the backward pass; ``"offload"`` keeps inputs on the CPU.

    Attributes:
        example_inputs: The model's inputs with which gates are found, where it needs others than the usual.
    """

    def __init__(
        self,
        source: BaseModelSource,
        lora: LoRAOptions,
        optimizer: OptimizerFactory,
        schedule: ScheduleOptions,
        loss: LossOptions,
        adapter: AdapterOptions,
        gradient_checkpointing: bool | Literal["offload"],
    ) -> None:
        lora, adapter = as_group(LoRAOptions, lora, "lora"), as_group(AdapterOptions, adapter, "adapter")
        start, quantization = None if adapter.start is None else adapter_folder(adapter.start), source.quantization
        if start is not None:
            lora = lora_of_adapter(start, lora)
            require_own_base(start, quantization)
            source = with_tokens_of_adapter(source, start)
        super().__init__(lora, adapter, own_base(lora, quantization.kind, quantization.double))
        self._start = start
        self.source = source
        self.schedule = as_group(ScheduleOptions, schedule, "schedule")
        self.loss = as_group(LossOptions, loss, "loss")
        self.gradient_checkpointing = gradient_checkpointing
        self.example_inputs: dict[str, Any] | None = None
        self._optimizer_factory = optimizer_factory(optimizer)
        self._rate: float | None = None
        self._rate_is_new = False
        self._step_average: StepAverage | None = None
        self._guard = StepGuard()
        # Plain values, and the same ones whether a script or the command line made the module.
        values = {
            "model_name_or_path": source.name_or_path,
            "lora": asdict(self.lora),
            "schedule": asdict(self.schedule),
            # A checkpoint has the adapter's weights and its kind of LoRA.
            "adapter": {**asdict(self.adapter), "start": None},
            "dtype": source.dtype,
            "attention_implementation": source.attention_implementation,
            "gradient_checkpointing": gradient_checkpointing,
            "revision": source.revision,
            "trust_remote_code": source.trust_remote_code,
        }
        description = describe_optimizer(self._optimizer_factory)
        self.save_hyperparameters(values if description is None else {**values, "optimizer": description})

    @property
    def _training_device(self) -> torch.device:
        """Where the model will train."""
        return self.trainer.strategy.root_device if attached_trainer(self) is not None else torch.device("cpu")

    @property
    def learning_rate(self) -> float | None:
        """The rate of the first group of parameters, before its schedule, where it is known; finders set it."""
        described = self.hparams.get("optimizer") or {}
        return described.get("init_args", {}).get("lr") if self._rate is None else self._rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._rate, self._rate_is_new = rate, True

    def _start_adapter(self, model: PeftModel) -> PeftModel:
        """Gives LoRA the weights to begin with, if there are any that a checkpoint does not replace."""
        if self._start is not None:
            load_adapter(model, self._start)
            rank_zero_info(f"Begins with the adapter {str(self._start)!r}{weights_of(self._start)}.")
        elif self.own_base is not None and not loads_checkpoint(self):
            count = begin_with_loftq(model, self.source)
            rank_zero_info(f"LoRA begins with what {self.own_base.kind} lost of the weights of {count} layers (LoftQ).")
        return model

    # ---- training ----

    @override
    def on_train_start(self) -> None:
        """Prepares the average over a step, and goes on with the random numbers of a checkpoint.

        Raises:
            ConfigurationError: Steps are to be skipped in more than one process.
        """
        super().on_train_start()
        if self.loss.on_nonfinite == "skip" and self.trainer.world_size > 1:
            raise ConfigurationError(
                "loss.on_nonfinite='skip' works in one process, as all would have to leave out the same steps; set it "
                "to 'stop'."
            )
        if self._rate is not None and self._rate_is_new:
            # A finder's, who knows of neither schedules nor groups with rates of their own.
            set_rate(self.trainer.optimizers[0], self._rate, self.trainer.lr_scheduler_configs[0].scheduler)
            self._rate_is_new = False
        self._guard = StepGuard()
        self._step_average = None
        # DeepSpeed keeps gradients where they cannot be scaled.
        if self.loss.average_over == "step" and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._step_average = StepAverage(self._mean_over_processes if self.trainer.world_size > 1 else None)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        reduced: Tensor = self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
        return reduced

    def _training_loss(self, sums: TokenSums, batch_idx: int, batch_size: int, run: Callable[[], Any]) -> Tensor:
        """Logs the loss of a batch and returns what is to be minimised; ``run`` repeats the forward pass."""
        mean_loss = sums.mean_loss
        self.log("train/loss", mean_loss.detach(), prog_bar=True, batch_size=batch_size)
        # Both at once, as each wait for the device costs time.
        is_finite, target_tokens = torch.stack([mean_loss.detach().isfinite(), sums.target_tokens]).tolist()
        if not is_finite:
            where = f"training batch {batch_idx} in optimizer step {self.trainer.global_step}"
            if self.loss.on_nonfinite == "stop":
                raise loss_error(where, float(mean_loss.detach()), nonfinite_origin(self.peft_model, run))
            self._leave_out(f"the loss of {where} is {float(mean_loss.detach())}")
            # A GradScaler leaves out steps by itself; otherwise the gradient reaches no weight.
            return mean_loss if self._has_scaler else torch.zeros_like(mean_loss, requires_grad=True)
        if target_tokens == 0:
            rank_zero_warn(
                f"training batch {batch_idx} has no target token, so nothing is learned from it; look at its labels.",
                category=NoTargetTokensWarning,
            )
        return mean_loss if self._step_average is None else self._step_average.loss(sums)

    @property
    def _has_scaler(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _leave_out(self, reason: str) -> None:
        rank_zero_warn(self._guard.leave_out(reason), category=NonFiniteStepWarning)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turns gradients of micro-batches into that of the mean over the step's tokens, before clipping."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._step_average is not None:
            self._step_average.finish_step(parameters, self.trainer.accumulate_grad_batches)
        if self._has_scaler:
            self._guard = StepGuard()
        elif self.loss.on_nonfinite == "skip":
            if not self._guard.skips and not has_finite_gradients(parameters):
                self._leave_out(f"the gradient of optimizer step {self.trainer.global_step} is not finite")
            self._guard.finish()

    @override
    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Steps, unless the step is left out for a loss or gradient that is not finite."""
        with suppress(SkippedStep):
            super().optimizer_step(*arguments, **keywords)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Makes the optimizer of the LoRA parameters and its schedule."""
        # DeepSpeed has the optimizer step partitions of its own, which may be elsewhere.
        fuse = not isinstance(self.trainer.strategy, DeepSpeedStrategy)
        optimizer = make_optimizer(self._optimizer_factory, self, self.peft_model, fuse)
        if self._rate is not None:
            set_rate(optimizer, self._rate)
            self._rate_is_new = False
        steps = self._options.planned_steps(self.trainer)
        if steps < (self.trainer.min_steps or 0):
            raise ConfigurationError(
                f"trainer.min_steps is {self.trainer.min_steps} and the fit ends after {steps:.0f} optimizer steps; "
                "raise trainer.max_epochs, or set trainer.max_steps."
            )
        epochs = self.trainer.max_epochs
        schedule = make_schedule(self.schedule, optimizer, steps, None if epochs == -1 else epochs)
        require_metric(self.schedule, self.trainer, self.metric_names())
        # Lightning's own steps of a plateau come after checkpoints, and are left out where a resumed epoch ends.
        config: Any = {"scheduler": schedule, "interval": self.schedule.interval, "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule; one that waits for a metric of validation is stepped where that is measured."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)
        elif self.schedule.monitor == "train/loss":
            loss = self.trainer.callback_metrics["train/loss"]
            scheduler.step(float(self._mean_over_processes(loss) if self.trainer.world_size > 1 else loss))

    # ---- evaluation ----

    @abstractmethod
    def _begin_evaluation(self) -> None:
        """Forgets the last evaluation."""

    @abstractmethod
    def _evaluate(self, batch: Mapping[str, Any]) -> None:
        """Adds a batch to the metrics."""

    @abstractmethod
    def _evaluated(self) -> Mapping[str, Any]:
        """The metrics of all batches and processes, by name."""

    @abstractmethod
    def metric_names(self) -> set[str]:
        """Names of the metrics that a fit logs and callbacks can monitor."""

    @override
    def on_validation_epoch_start(self) -> None:
        """Forgets the last evaluation."""
        self._begin_evaluation()

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self._evaluate(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all batches and processes."""
        self._log_metrics("validation")

    @override
    def on_test_epoch_start(self) -> None:
        """Forgets the last evaluation."""
        self._begin_evaluation()

    @override
    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self._evaluate(batch)

    @override
    def on_test_epoch_end(self) -> None:
        """Logs the metrics of all batches and processes."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for name, value in self._evaluated().items():
            self.log(f"{stage}/{name}", value, sync_dist=True)
            looks = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
            if looks and self.schedule.monitor == f"{stage}/{name}":
                plateau: Any = self.trainer.lr_scheduler_configs[0].scheduler
                plateau.step(float(value))
