"""The LightningModule: a Hugging Face language model, or one for images and text, with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from na_lora_lightning.adapters import (
    CHECKPOINT_KEY,
    RANDOM_STATE_KEY,
    adapter_keys,
    describe_adapter,
    gather_random_states,
    random_state_of_process,
    require_same_adapter,
    require_same_tensors,
    set_random_state,
    without_base_weights,
    write_adapter_folder,
)
from na_lora_lightning.arguments import (
    AdapterArguments,
    EvaluationArguments,
    LoRAArguments,
    LossArguments,
    ScheduleArguments,
    as_group,
)
from na_lora_lightning.callbacks.throughput import ThroughputCallback
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.evaluation import Evaluator, generate_answers, prompt_inputs
from na_lora_lightning.losses import StepAverage, TokenSums, accepts_logits_to_keep, model_inputs, token_sums
from na_lora_lightning.model_loading import (
    BaseModelSource,
    Dtype,
    add_lora,
    enable_gradient_checkpointing,
    load_base_model,
)
from na_lora_lightning.model_sharding import require_shardable, shard_model
from na_lora_lightning.nonfinite import (
    NonFiniteStepWarning,
    SkippedStep,
    StepGuard,
    has_finite_gradients,
    loss_error,
    nonfinite_origin,
    require_finite,
)
from na_lora_lightning.optimization import (
    OptimizerFactory,
    describe_optimizer,
    make_optimizer,
    make_schedule,
    optimizer_factory,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class NoTargetTokensWarning(UserWarning):
    """A training batch has no token to compute the loss on."""


class NALoRALightningModule(LightningModule):
    """Fine-tunes a causal language model, or a model for images and text, with LoRA.

    The model is loaded when a trainer needs it and is then in ``model``, a ``peft.PeftModel`` whose LoRA parameters
    alone are trainable. Checkpoints hold the adapter and not the base model. Training is plain LoRA;
    :class:`~na_lora_lightning.callbacks.gate_importance.GateImportanceCallback` and
    :class:`~na_lora_lightning.callbacks.step_scale.StepScaleCallback` add what makes it nonlinearity-aware.

    A batch has ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]`` and int64, with label -100
    off target; for generation also ``prompt_input_ids`` and ``prompt_attention_mask``, padded on the left, and the
    lists of strings ``prompts`` and ``references``. A model that takes images is also given whatever tensors of the
    batch it has arguments for (``pixel_values``, ...), in generation those whose names begin with ``prompt_``.

    Logged in training: ``train/loss`` (nats per target token) and what
    :class:`~na_lora_lightning.callbacks.throughput.ThroughputCallback` logs. In validation and test, each over all
    target tokens or answers: ``loss``, ``perplexity``, ``token_accuracy`` and ``exact_match``.

    Args:
        model_name_or_path: Folder of a model, or its name on the Hugging Face hub.
        lora: Which layers get LoRA, and of what kind.
        optimizer: Makes the optimizer from the trainable parameters.
        schedule: Learning rate over the optimizer steps.
        loss: How the training loss is computed.
        evaluation: What validation and test measure, and how text is generated.
        adapter: When and where the adapter is written as a PEFT folder.
        dtype: Of the base weights; ``"auto"`` is the checkpoint's own on a CUDA device and float32 elsewhere.
        attention_implementation: As transformers names it (``"sdpa"``, ``"eager"``, ...).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether a model from the hub may run code of its own.

    Raises:
        ConfigurationError: An argument has a value that cannot work.

    Example::

        module = NALoRALightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", lora=LoRAArguments(r=8, alpha=16))
        Trainer(max_epochs=1, callbacks=[GateImportanceCallback()]).fit(module, datamodule)
    """

    model: PeftModel | None

    def __init__(
        self,
        model_name_or_path: str,
        lora: LoRAArguments = LoRAArguments(),
        optimizer: OptimizerFactory = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        schedule: ScheduleArguments = ScheduleArguments(),
        loss: LossArguments = LossArguments(),
        evaluation: EvaluationArguments = EvaluationArguments(),
        adapter: AdapterArguments = AdapterArguments(),
        dtype: Dtype = "auto",
        attention_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigurationError(f"dtype={dtype!r} is unknown; use 'auto', 'float32', 'bfloat16' or 'float16'.")
        self.source = BaseModelSource(model_name_or_path, revision, trust_remote_code, dtype, attention_implementation)
        # Mappings come from a checkpoint's hyper-parameters.
        self.lora = as_group(LoRAArguments, lora, "lora")
        self.schedule = as_group(ScheduleArguments, schedule, "schedule")
        self.loss = as_group(LossArguments, loss, "loss")
        self.evaluation = as_group(EvaluationArguments, evaluation, "evaluation")
        self.adapter = as_group(AdapterArguments, adapter, "adapter")
        self.gradient_checkpointing = gradient_checkpointing
        self._optimizer_factory = optimizer_factory(optimizer)
        # Plain values, and the same ones whether a script or the command line made the module.
        values = {
            "model_name_or_path": model_name_or_path,
            "lora": asdict(self.lora),
            "schedule": asdict(self.schedule),
            "loss": asdict(self.loss),
            "evaluation": asdict(self.evaluation),
            "adapter": asdict(self.adapter),
            "dtype": dtype,
            "attention_implementation": attention_implementation,
            "gradient_checkpointing": gradient_checkpointing,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        description = describe_optimizer(self._optimizer_factory)
        self.save_hyperparameters(values if description is None else {**values, "optimizer": description})
        # The base weights are not in checkpoints; load_state_dict checks what is.
        self.strict_loading = False
        self.model = None
        self.evaluator = Evaluator(self.evaluation)
        self.written_adapter_folder: Path | None = None
        self._step_average: StepAverage | None = None
        self._guard = StepGuard()
        self._is_written = False
        self._random_state: Tensor | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.example_inputs: dict[str, Any] | None = None
        self._example_batch: Mapping[str, Any] | None = None

    # ---- model ----

    @override
    def setup(self, stage: str) -> None:
        """Asks the data module for an example, with which the gates of image encoders can be found.

        Raises:
            ConfigurationError: Something that is asked for does not work where the model is sharded.
        """
        require_shardable(self.trainer, generates=self.evaluation.generate or stage == "predict")
        example_batch = getattr(getattr(self.trainer, "datamodule", None), "example_batch", None)
        if stage == "fit" and callable(example_batch):
            self._example_batch = example_batch()

    @override
    def configure_model(self) -> None:
        """Loads the base model and adds LoRA, once."""
        if self.model is None:
            device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
            base = load_base_model(self.source, device)
            if self.gradient_checkpointing:
                enable_gradient_checkpointing(base)
            self.model = add_lora(base, self.lora, self.source)
            if self._trainer is not None:
                shard_model(self.model, self.trainer)
        if self._example_batch is not None:
            # Also where an evaluation before training has loaded the model.
            self.example_inputs = {**model_inputs(self.model, self._example_batch), "use_cache": False}

    @property
    def peft_model(self) -> PeftModel:
        """The model.

        Raises:
            ConfigurationError: It is not loaded yet.
        """
        if self.model is None:
            raise ConfigurationError("The model is not loaded yet; call configure_model() or use a Trainer first.")
        return self.model

    @override
    def forward(self, **inputs: Any) -> Any:
        """Runs the PEFT model on keyword arguments and returns the Hugging Face output."""
        return self.peft_model(**inputs)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Measures tokens per second."""
        return [ThroughputCallback()]

    @override
    def on_fit_start(self) -> None:
        """Reports how many parameters train."""
        self._is_written = False
        trainable, total = self.peft_model.get_nb_trainable_parameters()
        rank_zero_info(f"LoRA trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.3g} %).")
        for logger in self.loggers:
            logger.log_metrics({"model/trainable_parameters": trainable, "model/total_parameters": total}, step=0)

    # ---- training ----

    @override
    def on_train_start(self) -> None:
        """Prepares the average over a step, and goes on with the random numbers of a checkpoint."""
        if self._random_state is not None:
            # Dropout then draws what it would have drawn without the interruption.
            set_random_state(self._random_state, self.device)
            self._random_state = None
        if self.loss.on_nonfinite == "skip" and self.trainer.world_size > 1:
            raise ConfigurationError(
                "loss.on_nonfinite='skip' works in one process, as all would have to leave out the same steps; set it "
                "to 'stop'."
            )
        self._guard = StepGuard()
        self._step_average = None
        # DeepSpeed keeps gradients where they cannot be scaled.
        if self.loss.average_over == "step" and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._step_average = StepAverage(self._mean_over_processes if self.trainer.world_size > 1 else None)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        reduced: Tensor = self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
        return reduced

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch, a scalar in nats per target token."""
        model = self.peft_model
        only_targets = self.loss.logits == "targets" and accepts_logits_to_keep(model)
        sums = token_sums(model, batch, only_targets)

        def run() -> Any:
            return model(**model_inputs(model, batch), use_cache=False)

        return self._training_loss(sums, batch_idx, len(batch["labels"]), run)

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
                f"Training batch {batch_idx} has no target token, so nothing is learned from it; look at its labels.",
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
        optimizer = make_optimizer(self._optimizer_factory, self.parameters())
        schedule = make_schedule(self.schedule, optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_train_end(self) -> None:
        """Writes the adapter."""
        self._is_written = self.adapter.write != "never"
        if self._is_written:
            # A collective call where the parameters are sharded.
            state = self.trainer.strategy.lightning_module_state_dict()
            require_finite(without_base_weights(state, adapter_keys(self)), self.trainer.global_step)
            self._write_adapter(state)

    @override
    def on_fit_end(self) -> None:
        """Writes the adapter where the checkpoint to go on from was the last one, so that there was no training."""
        if self.adapter.write != "never" and not self._is_written and self.trainer.global_step > 0:
            self._write_adapter(self.trainer.strategy.lightning_module_state_dict())
            rank_zero_info(f"Training had ended already; its adapter is now in {str(self.written_adapter_folder)!r}.")

    # ---- evaluation ----

    @override
    def on_validation_epoch_start(self) -> None:
        """Forgets the last evaluation."""
        self.evaluator.begin()

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        tokenizer = self._answer_tokenizer() if self.evaluation.generate else None
        self.evaluator.add(self.peft_model, batch, tokenizer, self.trainer.world_size)

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all batches and processes."""
        self._log_metrics("validation")

    @override
    def on_test_epoch_start(self) -> None:
        """Forgets the last evaluation."""
        self.evaluator.begin()

    @override
    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self.validation_step(batch, batch_idx)

    @override
    def on_test_epoch_end(self) -> None:
        """Logs the metrics of all batches and processes."""
        self._log_metrics("test")

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[str]:
        """Generates an answer to each prompt of a batch."""
        return generate_answers(self.peft_model, self._answer_tokenizer(), prompt_inputs(batch), self.evaluation)

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.evaluator.metrics.compute().items():
            self.log(f"{stage}/{name}", value, sync_dist=True)

    def _answer_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
            if tokenizer is None:
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(
                    self.source.resolved_name_or_path,
                    revision=self.source.revision or "main",
                    trust_remote_code=self.source.trust_remote_code,
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    # ---- checkpoints ----

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the base model out."""
        checkpoint[CHECKPOINT_KEY] = describe_adapter(self.peft_model, self.lora)
        if self._trainer is not None:
            # Only the first process writes, and each has random numbers of its own.
            checkpoint[RANDOM_STATE_KEY] = gather_random_states(self.device, self.trainer.world_size)
        if checkpoint["state_dict"]:
            checkpoint["state_dict"] = without_base_weights(checkpoint["state_dict"], adapter_keys(self))
            require_finite(checkpoint["state_dict"], checkpoint.get("global_step", 0))
        if self.adapter.write == "checkpoint" and self._trainer is not None:
            self._write_adapter(checkpoint["state_dict"])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or LoRA."""
        if CHECKPOINT_KEY not in checkpoint:
            raise ConfigurationError(f"The checkpoint was not written by {type(self).__name__}; load one that was.")
        require_same_adapter(checkpoint[CHECKPOINT_KEY], describe_adapter(self.peft_model, self.lora))
        states = checkpoint.get(RANDOM_STATE_KEY)
        if states is not None and self._trainer is not None and self.trainer.state.fn == "fit":
            self._random_state = random_state_of_process(states, self.global_rank, self.trainer.world_size)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads an adapter, or a whole state dict.

        Raises:
            ConfigurationError: The adapter's tensors are not exactly those of this model.
        """
        require_same_tensors(state_dict, self.state_dict(), adapter_keys(self))
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        # What is missing now is the base model, and no news.
        result.missing_keys.clear()
        return result

    def _write_adapter(self, state: Mapping[str, Tensor]) -> None:
        folder = self.adapter.folder
        if folder is None:
            # The trainer broadcasts it, so every process has to ask.
            folder = str(Path(self.trainer.log_dir or self.trainer.default_root_dir) / "adapter")
        if self.trainer.is_global_zero:
            self.written_adapter_folder = write_adapter_folder(self.peft_model, folder, state)
        self.trainer.strategy.barrier()
