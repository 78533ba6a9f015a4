"""A LightningModule around a PEFT model: checkpoints of the adapter alone, and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.checkpoints.adapter_state import (
    CHECKPOINT_KEY,
    adapter_keys,
    describe_adapter,
    require_same_adapter,
    require_same_tensors,
    without_base_weights,
    write_adapter_folder,
)
from na_lora_lightning.checkpoints.averaging import (
    CURRENT_STATE,
    average_adapter_alone,
    require_suitable_callbacks,
    restore_averages,
    weight_averaging,
)
from na_lora_lightning.checkpoints.measurements import (
    Measurement,
    WrittenAdapter,
    load_best,
    monitored_checkpoint,
    validation_metrics,
)
from na_lora_lightning.checkpoints.model_card import adapter_card
from na_lora_lightning.checkpoints.random_state import (
    RANDOM_STATE_KEY,
    gather_random_states,
    random_state_of_process,
    set_random_state,
)
from na_lora_lightning.checkpoints.run_folder import require_own_adapter, run_callback, run_folder
from na_lora_lightning.checkpoints.run_folders import is_dry_run
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import attached_trainer
from na_lora_lightning.modules.nonfinite import require_finite
from na_lora_lightning.modules.resumed_callbacks import adopt_callback_states
from na_lora_lightning.modules.resumed_options import ResumedOptions

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterModule(LightningModule):
    """Keeps the adapter of a PEFT model, which a subclass loads into ``model``.

    Args:
        lora: What the adapter is.
        adapter: When and where it is written as a PEFT folder.
        own_base: The base to which alone the adapter belongs; None stands for its base in any form.

    Attributes:
        draws_seed: Whether the seed of a run was drawn, and is not an option of it.
    """

    model: PeftModel | None

    def __init__(self, lora: LoRAOptions, adapter: AdapterOptions, own_base: BaseQuantization | None = None) -> None:
        super().__init__()
        self.lora = lora
        self.own_base = own_base
        self.adapter = adapter
        # The base weights are not in checkpoints; load_state_dict checks what is.
        self.strict_loading = False
        self.model = None
        self.written_adapter: WrittenAdapter | None = None
        self._is_written = False
        self._validated: Measurement | None = None
        self._callbacks_of_fit: list[Callback] | None = None
        self._random_state: Tensor | None = None
        self.draws_seed = False
        self._options = ResumedOptions()

    @property
    def written_adapter_folder(self) -> Path | None:
        """Where this process has written the adapter."""
        return None if self.written_adapter is None else self.written_adapter.folder

    @property
    def peft_model(self) -> PeftModel:
        """The model.

        Raises:
            ConfigurationError: It is not loaded yet.
        """
        if self.model is None:
            raise ConfigurationError("the model is not loaded yet; call configure_model() or use a Trainer first.")
        return self.model

    @override
    def setup(self, stage: str) -> None:
        """Forgets the options of an earlier fit, and checks what the adapter that is to be written depends on.

        Raises:
            ConfigurationError: The best one is to be written, and nothing tells which that is.
        """
        self._options = ResumedOptions(draws_seed=self.draws_seed)
        self._callbacks_of_fit = None
        if stage == "fit" and self.adapter.write == "best" and not is_dry_run(self.trainer):
            monitored_checkpoint(self.trainer)

    @override
    def forward(self, **inputs: Any) -> Any:
        """Runs the PEFT model on keyword arguments and returns the Hugging Face output."""
        return self.peft_model(**inputs)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """None; refuses those that would change or store the base model.

        Raises:
            ConfigurationError: There is one of them.
        """
        if attached_trainer(self) is not None:
            require_suitable_callbacks(self.trainer)
        return []

    @override
    def on_fit_start(self) -> None:
        """Reports how many parameters train."""
        self._is_written = False
        average_adapter_alone(self.trainer, self)
        self._options.begin(self.trainer, self)
        self._callbacks_of_fit = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.adapter.write != "never" and not is_dry_run(self.trainer):
            is_named = self.adapter.folder is not None
            require_own_adapter(self.trainer, self._adapter_folder(), is_named, self.written_adapter_folder)
        trainable, total = self.peft_model.get_nb_trainable_parameters()
        rank_zero_info(f"LoRA trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.3g} %).")
        for logger in self.loggers:
            logger.log_metrics({"model/trainable_parameters": trainable, "model/total_parameters": total}, step=0)

    @override
    def on_train_start(self) -> None:
        """Goes on with the random numbers of a checkpoint."""
        if self._random_state is not None:
            # Dropout then draws what it would have drawn without the interruption.
            set_random_state(self._random_state, self.device)
            self._random_state = None

    @override
    def on_train_end(self) -> None:
        """Writes the adapter."""
        self._is_written = self.adapter.write != "never"
        if self._is_written and not self._writes_nothing():
            self._write_trained()

    @override
    def on_fit_end(self) -> None:
        """Writes the adapter where the checkpoint to resume from was the last one, so that there was no training."""
        is_due = self.adapter.write != "never" and not self._is_written and self.trainer.global_step > 0
        if is_due and not is_dry_run(self.trainer):
            self._write_trained()
            rank_zero_info(f"Training had ended already; its adapter is now in {str(self.written_adapter_folder)!r}.")

    @override
    def on_validation_end(self) -> None:
        """Remembers what validation measured, and when."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._validated = Measurement("after", self.trainer.global_step, validation_metrics(self.trainer))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the base model out."""
        checkpoint[CHECKPOINT_KEY] = describe_adapter(self.peft_model, self.lora, self.own_base)
        if attached_trainer(self) is not None:
            # Only the first process writes, and each has random numbers of its own.
            checkpoint[RANDOM_STATE_KEY] = gather_random_states(self.device, self.trainer.world_size)
            self._options.save(checkpoint)
        for part in ("state_dict", CURRENT_STATE):
            if checkpoint.get(part):
                checkpoint[part] = without_base_weights(checkpoint[part], adapter_keys(self))
                require_finite(checkpoint[part], checkpoint.get("global_step", 0))
        if self.adapter.write == "each" and attached_trainer(self) is not None and not self._writes_nothing():
            self._write_adapter(checkpoint["state_dict"], f"step {self.trainer.global_step}, a checkpoint")

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or LoRA."""
        if CHECKPOINT_KEY not in checkpoint:
            raise ConfigurationError(f"the checkpoint was not written by {type(self).__name__}; load one that was.")
        current = describe_adapter(self.peft_model, self.lora, self.own_base)
        require_same_adapter(checkpoint[CHECKPOINT_KEY], current)
        if attached_trainer(self) is None or self.trainer.state.fn != "fit":
            return
        restore_averages(checkpoint, self.state_dict(), bool(weight_averaging(self.trainer)))
        self._options = ResumedOptions(checkpoint, self.draws_seed)
        adopt_callback_states(checkpoint, self.trainer)
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # Sharded models load theirs when the fit has started.
            self._options.begin(self.trainer, self)
        states = checkpoint.get(RANDOM_STATE_KEY)
        if states is not None and self._options.keeps_random_state:
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

    def _writes_nothing(self) -> bool:
        """Whether this is a dry run, or a sweep of a finder, which has other callbacks than the fit or precedes it."""
        trainer = self.trainer
        is_fit = trainer.state.fn == "fit" and trainer.state.status == "running"
        current, of_fit = trainer.callbacks, self._callbacks_of_fit  # type: ignore[attr-defined]
        is_sweep = of_fit is None or any(callback not in current for callback in of_fit)
        return is_dry_run(trainer) or (is_fit and is_sweep)

    def _adapter_folder(self) -> Path:
        # The trainer broadcasts it, so every process has to ask.
        return run_folder(self.trainer) / "adapter" if self.adapter.folder is None else Path(self.adapter.folder)

    def _write_trained(self) -> None:
        """Writes the adapter at the end of a fit."""
        best = monitored_checkpoint(self.trainer) if self.adapter.write == "best" else None
        if best is not None and best.best_model_path:
            # One process writes, so one has to read.
            checkpoint, weights, measured = load_best(best) if self.trainer.is_global_zero else ({}, "", None)
            self._write_adapter(checkpoint.get("state_dict", {}), weights, measured)
            return
        if best is not None:
            rank_zero_warn(
                f"adapter.write is 'best', and {best.monitor!r} was never measured, so that no checkpoint is the best; "
                "the adapter is that of the last step."
            )
        # A collective call where the parameters are sharded.
        state = self.trainer.strategy.lightning_module_state_dict()
        require_finite(without_base_weights(state, adapter_keys(self)), self.trainer.global_step)
        averaged = ", an average over steps" if weight_averaging(self.trainer) else ""
        self._write_adapter(state, f"step {self.trainer.global_step}, the last{averaged}")

    def _write_adapter(self, state: Mapping[str, Tensor], weights: str, best: Measurement | None = None) -> None:
        folder, run = self._adapter_folder(), run_callback(self.trainer)
        if self.trainer.is_global_zero:
            measured, own_base = self._measurements(best), self.own_base
            card = adapter_card(self.peft_model, self.trainer, self.hparams, weights, measured, folder, own_base)
            owner = None if run is None or self.adapter.folder is None else run.record.run
            path = write_adapter_folder(
                self.peft_model, folder, state, reader=self._reader(), card=card, run=owner, own_base=own_base
            )
            self.written_adapter = WrittenAdapter(path, weights)
        self.trainer.strategy.barrier()

    def _measurements(self, best: Measurement | None) -> list[Measurement]:
        """What validation found before training, where the adapter is best, and after it."""
        summaries = (getattr(callback, "measurements", None) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        found = next((summary for summary in summaries if summary), [self._validated] if self._validated else [])
        return [*found[:-1], *([] if best is None else [best]), *found[-1:]]

    def _reader(self) -> Any:
        """The processor or tokenizer of the data; None if there is neither."""
        datamodule = getattr(self.trainer, "datamodule", None)
        readers = (getattr(datamodule, name, None) for name in ("processor", "tokenizer"))
        return next((reader for reader in readers if hasattr(reader, "save_pretrained")), None)
