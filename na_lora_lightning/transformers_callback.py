"""Both mechanisms under the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from na_lora_lightning.checkpoints.controller_state import STATE_FILE, find_state, fingerprint, save_state
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.stepping.optimizers import stepping_optimizer
from na_lora_lightning.errors import CheckpointError, ConfigurationError, UpdateError
from na_lora_lightning.gate_history import GateHistory
from na_lora_lightning.plain_pytorch import attached_controller

if TYPE_CHECKING:
    from transformers import Trainer

# A Trainer does not tell its callbacks when training fails, so the next training of a model cleans up.
_left: WeakKeyDictionary[nn.Module, tuple[ref[GateController], ref[Optimizer]]] = WeakKeyDictionary()


class NALoRATrainerCallback(TrainerCallback, ExportableState):
    """Nonlinearity-aware LoRA for ``transformers.Trainer``: the mask and the step scale in one callback.

    Works with any optimizer, schedule, clipping, gradient accumulation, ``fp16`` and ``bf16``; evaluation is not
    counted. Its state is saved in each checkpoint as ``na_lora_state.pt`` and restored when training resumes.

    Metrics are added to the Trainer's training logs, so that ``trainer.state.log_history`` and the console show them:
    ``gates/responsiveness`` and the others that the callbacks for Lightning write. Trainer calls the callbacks that
    write to TensorBoard, W&B and the like before yours; :meth:`add_to` puts this one before them.

    Args:
        importance: Options of the temporal-importance mask, also as a dictionary; None leaves it out.
        step_scale: Options of the step scale, also as a dictionary; None leaves it out.
        observer: What the statistics look at, also as a dictionary. ``exclude_prompt`` needs a model that is called
            with labels: no label smoothing and no ``compute_loss_func``.
        example_inputs: Keyword arguments of one small forward pass, for models that take more than text.
        allow_unmasked_gates: Accept that some gates have no LoRA instead of stopping with their names.
        log_layers: Log each curve of each layer too (``gate_responsiveness/layer_03``), and not over all layers alone.
        history: Keep the gates of each layer at logging steps, with losses and metrics, in ``history.jsonl`` in
            ``args.output_dir``, for ``na-lora report``.
        resume_from: Folder of the checkpoint to resume from, needed where it is neither in ``args.output_dir`` nor
            ``args.resume_from_checkpoint``.

    Attributes:
        controller: The controller of the last training, or None before.

    Raises:
        ConfigurationError: Both mechanisms are left out.

    Example::

        trainer = Trainer(peft_model, arguments, train_dataset=data, callbacks=[NALoRATrainerCallback()])
        trainer.train()
    """

    def __init__(
        self,
        importance: ImportanceOptions | Mapping[str, Any] | None = ImportanceOptions(),
        step_scale: StepScaleOptions | Mapping[str, Any] | None = StepScaleOptions(),
        observer: ObserverOptions | Mapping[str, Any] = ObserverOptions(),
        example_inputs: Mapping[str, Any] | None = None,
        allow_unmasked_gates: bool = False,
        log_layers: bool = False,
        history: bool = True,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self._importance = ImportanceOptions(**importance) if isinstance(importance, Mapping) else importance
        self._step_scale = StepScaleOptions(**step_scale) if isinstance(step_scale, Mapping) else step_scale
        self._observer = ObserverOptions(**observer) if isinstance(observer, Mapping) else observer
        self._example_inputs = example_inputs
        self._allow_unmasked_gates = allow_unmasked_gates
        self._log_layers = log_layers
        self._keeps_history = history
        self._history: GateHistory | None = None
        self._resume_from = resume_from
        self._is_first_to_log = False
        self.controller: GateController | None = None

    def add_to(self, trainer: Trainer) -> NALoRATrainerCallback:
        """Adds the callback to ``trainer``, before the callbacks that report logs; instead of ``callbacks=[...]``."""
        require_supported_arguments(trainer.args)
        # The first one is Trainer's own, which decides what is logged.
        trainer.callback_handler.callbacks.insert(1, self)
        self._is_first_to_log = True
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuses what cannot work when the Trainer is made."""
        require_supported_arguments(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the gates, puts the hooks on, and restores the state when training resumes.

        Raises:
            CheckpointError: Training resumes, and the state that belongs to the checkpoint was not found.
            ConfigurationError: Options do not fit the gates, or another callback has put its hooks on.
            DiscoveryError: No gate was found, or one has no LoRA.
            UpdateError: The update of the gates' rows cannot be reached.
        """
        require_supported_arguments(args)
        self._warn_of_hidden_logs(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.restore_callback_states_from_checkpoint and self._example_inputs is not None:
            raise ConfigurationError(
                "restore_callback_states_from_checkpoint recreates this callback from the checkpoint, which cannot "
                "hold example_inputs; set it to False."
            )
        self.detach()
        _detach_left_over(model, stepping_optimizer(optimizer))
        self.controller = attached_controller(
            model,
            [optimizer],
            importance=self._importance,
            step_scale=self._step_scale,
            observer=self._observer,
            example_inputs=self._example_inputs,
            allow_unmasked_gates=self._allow_unmasked_gates,
        )
        _left[model] = (ref(self.controller), ref(stepping_optimizer(optimizer)))
        if state.global_step > 0:
            try:
                self._restore(args, state)
            except BaseException:
                self.detach()
                raise
        self.controller.total_steps = self.controller.steps + state.max_steps - state.global_step
        self.controller.announce()
        self._history = None
        if self._keeps_history and state.is_world_process_zero and args.output_dir:
            self._history = GateHistory(args.output_dir, self.controller, _options_of(args, model))
            self._history.start(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decides whether the coming step is measured for selection misalignment."""
        step = state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
        self._attached().meter.enabled = by_steps or (step == 1 and args.logging_first_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forgets the statistics of a skipped step."""
        self._attached().discard_unstepped()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics to the logs of training."""
        # Evaluation and the summary at the end call their losses otherwise.
        if self.controller is None or logs is None:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        if "loss" not in logs or "learning_rate" not in logs:
            if self._history is not None and "eval_loss" in logs:
                self._history.validation(state.global_step, numbers)
            return
        if self._history is not None:
            self._history.step(state.global_step, numbers)
        found = self.controller.gate_metrics()
        named = found.overview() | (found.by_layer() if self._log_layers else {})
        logs.update(named)
        # Trainer has put a copy of the logs there already.
        state.log_history[-1].update(named)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the state into the checkpoint's folder."""
        folder = _checkpoint_folder(args, state)
        if not args.should_save or self.controller is None:
            return
        if not folder.is_dir():
            warnings.warn(
                f"no NA-LoRA state was saved, because the checkpoint is not in {str(folder)!r} (a search of "
                "hyperparameters keeps it elsewhere), so training cannot resume from it.",
                stacklevel=2,
            )
            return
        save_state(self.controller.state_dict(), folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the hooks off, and warns of what never acted."""
        if self.controller is not None:
            self.controller.conclude()
        if self._history is not None:
            self._history.end(state.global_step)
        self.detach()

    def detach(self) -> None:
        """Takes the hooks off; for training that failed, of which a Trainer does not tell its callbacks."""
        if self.controller is not None:
            self.controller.detach()

    def state(self) -> dict[str, Any]:
        """What transformers writes to ``trainer_state.json``: options, and which state file belongs to it."""
        return {
            "args": {
                "importance": None if self._importance is None else asdict(self._importance),
                "step_scale": None if self._step_scale is None else asdict(self._step_scale),
                "observer": asdict(self._observer),
                "allow_unmasked_gates": self._allow_unmasked_gates,
                "log_layers": self._log_layers,
                "history": self._keeps_history,
                "resume_from": None if self._resume_from is None else os.fspath(self._resume_from),
            },
            "attributes": {
                "fingerprint": None if self.controller is None else fingerprint(self.controller.state_dict())
            },
        }

    def _attached(self) -> GateController:
        assert self.controller is not None, "on_train_begin comes first"
        return self.controller

    def _warn_of_hidden_logs(self, args: TrainingArguments) -> None:
        # A list, once the arguments have been checked by transformers.
        reporters = [name for name in args.report_to or () if name != "none"]
        if reporters and not self._is_first_to_log:
            warnings.warn(
                f"the gate metrics are not reported to {', '.join(reporters)}, because Trainer calls what reports logs "
                "before the callbacks that it was given; add this one by NALoRATrainerCallback(...).add_to(trainer).",
                stacklevel=2,
            )

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        # Annotated as the list that it is made from.
        entries: Any = state.stateful_callbacks
        name = type(self).__name__
        entry = entries.get(name)
        if entry is None:
            warnings.warn(
                "training resumes from a checkpoint that was saved without this callback, so the statistics of the "
                "gates and the warm-up start over.",
                stacklevel=2,
            )
            # Trainer expects every callback of this kind to have an entry when it saves.
            entries[name] = self.state()
            return
        wanted = (entry[-1] if isinstance(entry, list) else entry)["attributes"]["fingerprint"]
        candidates = [self._resume_from, args.resume_from_checkpoint, _checkpoint_folder(args, state)]
        looked_in = [Path(candidate) for candidate in candidates if isinstance(candidate, (str, os.PathLike))]
        saved = find_state(looked_in, wanted)
        if saved is not None:
            self._attached().load_state_dict(saved)
            return
        raise CheckpointError(
            f"the NA-LoRA state of the checkpoint at step {state.global_step} was not found (no intact {STATE_FILE} "
            f"that belongs to it in {', '.join(map(str, looked_in))}), so this would not be the run that was "
            "interrupted; give NALoRATrainerCallback(resume_from=...) the folder of the checkpoint."
        )


def require_supported_arguments(args: TrainingArguments) -> None:
    """Checks that a Trainer steps the model's own LoRA parameters.

    Raises:
        UpdateError: Its arguments, or accelerate's configuration, ask for a way of training in which the update of a
            gate's rows cannot be reached.
    """
    # Of accelerate's ways, those that replicate the model in each process, or have one process.
    distributed = args.distributed_state.distributed_type.value if args.distributed_state is not None else "NO"
    if args.deepspeed or distributed == "DEEPSPEED":
        refused = "DeepSpeed"
    elif args.fsdp or distributed == "FSDP":
        refused = "FSDP"
    elif args.n_gpu > 1:
        refused = "DataParallel (several GPUs in one process)"
    elif distributed != "NO" and not distributed.startswith("MULTI_"):
        refused = distributed
    else:
        return
    raise UpdateError(
        f"{refused} shards or copies the LoRA parameters, so under Trainer the update of a gate's rows cannot be "
        "reached; use a single device, or one process per GPU with torchrun or accelerate launch (DDP)."
    )


def _options_of(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """Hyper-parameters that people compare runs by."""
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "seed")
    options = {name: getattr(args, name) for name in (*names, "weight_decay", "warmup_steps")}
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    lora = {f"lora.{name}": getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
    found = {"model": getattr(config, "base_model_name_or_path", None), **options, **lora}
    return {name: value for name, value in found.items() if value is not None}


def _detach_left_over(model: nn.Module, optimizer: Optimizer) -> None:
    """Takes off what a training that failed has left on the model; not what another callback has just put there."""
    controller, its_optimizer = (reference() for reference in _left.pop(model, (lambda: None, lambda: None)))
    if isinstance(controller, GateController) and its_optimizer is not optimizer:
        controller.detach()


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
