"""The LightningModule: a Hugging Face language model, or one for images and text, with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.arguments import (
    AdapterOptions,
    EvaluationOptions,
    LoRAOptions,
    LossOptions,
    ScheduleOptions,
    as_group,
)
from na_lora_lightning.callbacks.gate_callback import GateCallback
from na_lora_lightning.checkpoints.adapter_state import CHECKPOINT_KEY
from na_lora_lightning.data.answers import stop_at
from na_lora_lightning.data.text.supervised import SupervisedDataModule
from na_lora_lightning.data.text.tokenizer import add_tokens
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.lightning_internals import attached_trainer, loads_checkpoint
from na_lora_lightning.models.eva import begin_with_eva
from na_lora_lightning.models.limits import ModelLimits
from na_lora_lightning.models.loading import compile_blocks, enable_gradient_checkpointing, load_base_model
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.new_tokens import require_same_ids
from na_lora_lightning.models.packing import require_packable
from na_lora_lightning.models.quantization import QuantizationOptions
from na_lora_lightning.models.sharding import require_shardable, shard_model
from na_lora_lightning.models.source import BaseModelSource, Dtype
from na_lora_lightning.modules.evaluation import Evaluator, generate_answers, prompt_inputs
from na_lora_lightning.modules.losses import model_inputs, require_logits, token_sums
from na_lora_lightning.modules.optimization import OptimizerFactory
from na_lora_lightning.modules.throughput import ThroughputCallback
from na_lora_lightning.modules.training import AdapterTrainingModule, NoTargetTokensWarning

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NALoRALightningModule", "NoTargetTokensWarning"]


class NALoRALightningModule(AdapterTrainingModule):
    """Fine-tunes a causal language model, or a model for images and text, with LoRA.

    The model is loaded when a trainer needs it and is then in ``model``, a ``peft.PeftModel`` whose LoRA parameters
    alone are trainable. Checkpoints hold the adapter and not the base model. Training is plain LoRA;
    :class:`~na_lora_lightning.callbacks.gate_importance.GateImportanceCallback` and
    :class:`~na_lora_lightning.callbacks.step_scale.StepScaleCallback` add what makes it nonlinearity-aware.

    A batch has ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]`` and int64, with label -100
    off target; packed records have ``position_ids`` in place of the mask. For generation there are also
    ``prompt_input_ids`` and ``prompt_attention_mask``, padded on the left, and the lists of strings ``prompts`` and
    ``references``. A model that takes images is also given whatever tensors of the
    batch it has arguments for (``pixel_values``, ...), in generation those whose names begin with ``prompt_``.

    Logged in training: ``train/loss`` (nats per target token) and what
    :class:`~na_lora_lightning.modules.throughput.ThroughputCallback` logs. In validation and test, each over all
    target tokens or answers: ``loss``, ``perplexity`` and ``token_accuracy``, and of generated answers ``exact_match``
    and ``contains_match``.

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
            ``"offload"`` also keeps what each block is given, from which it is recomputed, in the CPU's memory.
        compile: Have ``torch.compile`` make graphs of the model's blocks. Not with NA-LoRA's callbacks, which look into
            blocks between graphs.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether a model from the hub may run code of its own.
        quantization: In what form the frozen base weights are held (QLoRA).
        new_tokens: Texts that are one token each, such as ``["<think>", "</think>"]``; their embeddings, and their rows
            of an output head with weights of its own, are trained. The data module takes the same list.

    Raises:
        ConfigurationError: An argument has a value that cannot work.

    Example::

        module = NALoRALightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", lora=LoRAOptions(r=8, alpha=16))
        Trainer(max_epochs=1, callbacks=[GateImportanceCallback()]).fit(module, datamodule)
    """

    def __init__(
        self,
        model_name_or_path: str,
        lora: LoRAOptions = LoRAOptions(),
        optimizer: OptimizerFactory = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        schedule: ScheduleOptions = ScheduleOptions(),
        loss: LossOptions = LossOptions(),
        evaluation: EvaluationOptions = EvaluationOptions(),
        adapter: AdapterOptions = AdapterOptions(),
        dtype: Dtype = "auto",
        attention_implementation: str | None = None,
        gradient_checkpointing: bool | Literal["offload"] = False,
        compile: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization: QuantizationOptions = QuantizationOptions(),
        new_tokens: list[str] | None = None,
    ) -> None:
        if gradient_checkpointing not in (True, False, "offload"):
            raise ConfigurationError(
                f"gradient_checkpointing={gradient_checkpointing!r} is unknown; use true, false or 'offload'."
            )
        if compile and gradient_checkpointing == "offload":
            raise ConfigurationError(
                "compile makes one graph of a block, and gradient_checkpointing='offload' moves tensors between blocks "
                "outside of graphs; set compile to false, or gradient_checkpointing to true."
            )
        quantization = as_group(QuantizationOptions, quantization, "quantization")
        super().__init__(
            BaseModelSource(
                model_name_or_path,
                revision,
                trust_remote_code,
                dtype,
                attention_implementation,
                quantization,
                new_tokens or (),
            ),
            lora=lora,
            optimizer=optimizer,
            schedule=schedule,
            loss=loss,
            adapter=adapter,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.evaluation = as_group(EvaluationOptions, evaluation, "evaluation")
        self.save_hyperparameters(
            {
                "loss": asdict(self.loss),
                "evaluation": asdict(self.evaluation),
                "compile": compile,
                "quantization": asdict(quantization),
                "new_tokens": list(self.source.new_tokens),
            }
        )
        self.compiles_blocks = compile
        self.evaluator = Evaluator(self.evaluation)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._example_batch: Mapping[str, Any] | None = None
        self._has_begun = False
        # The tokens that the targets of the data end in.
        self.end_token_ids: list[int] = []
        self._limits: ModelLimits | None = None
        # Who makes many fits of one model has it read once.
        self.load_base: Callable[[BaseModelSource, torch.device], PreTrainedModel] = load_base_model

    # ---- model ----

    @override
    def setup(self, stage: str) -> None:
        """Asks the data module where answers end, and for an example, with which gates of image encoders can be found.

        Raises:
            ConfigurationError: Something that is asked for does not work where the model is sharded.
        """
        super().setup(stage)
        # Unknown to type checkers.
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.compiles_blocks and any(isinstance(callback, GateCallback) for callback in callbacks):
            raise ConfigurationError(
                "model.compile makes graphs of whole blocks, which NA-LoRA's callbacks interrupt at each gate, so that "
                "every layer would be compiled by itself until torch gives up; set model.compile to false."
            )
        generates = self.evaluation.generate or stage == "predict"
        require_shardable(self.trainer, generates=generates, quantized=self.source.quantization.kind is not None)
        datamodule = getattr(self.trainer, "datamodule", None)
        self._end_answers_at(getattr(datamodule, "end_token_ids", ()))
        example_batch = getattr(datamodule, "example_batch", None)
        if stage == "fit" and callable(example_batch):
            self._example_batch = example_batch()

    @override
    def configure_model(self) -> None:
        """Loads the base model and adds LoRA, once."""
        if self.model is None:
            base = self.load_base(self.source, self._training_device)
            self._limits = ModelLimits(base)
            self._require_data_fits()
            if self.gradient_checkpointing:
                enable_gradient_checkpointing(base, offload=self.gradient_checkpointing == "offload")
            self.model = self._start_adapter(add_lora(base, self.lora, self.source))
            self._begin_with_data(self.model)
            self._end_answers_at(())
            if attached_trainer(self) is not None:
                shard_model(self.model, self.trainer)
            if self.compiles_blocks:
                compile_blocks(self.model.get_base_model())
        else:
            self._require_data_fits()
            self._begin_with_data(self.model)
        if self._example_batch is not None:
            # Also where an evaluation before training has loaded the model.
            self.example_inputs = {**model_inputs(self.model, self._example_batch), "use_cache": False}

    def _begin_with_data(self, model: PeftModel) -> None:
        """Looks at training data before the first step of a fit, for an initialisation that depends on them."""
        trainer = attached_trainer(self)
        fits = trainer is not None and trainer.state.fn == "fit" and not loads_checkpoint(self)
        if trainer is None or not fits or self.lora.init_lora_weights != "eva" or self._start or self._has_begun:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None or trainer.world_size > 1:
            raise ConfigurationError(
                "lora.init_lora_weights='eva' looks at the training data of a data module in one process; give the fit "
                "a data module and one device, or use 'orthogonal'."
            )
        with isolate_rng():
            inputs = (model_inputs(model, batch) for batch in datamodule.train_dataloader())
            count = begin_with_eva(model, inputs)
        self._has_begun = True
        rank_zero_info(f"LoRA begins with what its layers are given in {count} batches of the training data (EVA).")

    def _end_answers_at(self, token_ids: Iterable[int]) -> None:
        """Has the model stop where targets end wherever it generates; adapters and merged models take it from there."""
        self.end_token_ids = list(dict.fromkeys([*self.end_token_ids, *token_ids]))
        base: Any = None if self.model is None else self.model.get_base_model()
        if getattr(base, "generation_config", None) is not None:
            stop_at(base.generation_config, self.end_token_ids)

    def _require_data_fits(self) -> None:
        """Checks data before anything is trained on it."""
        datamodule = getattr(attached_trainer(self), "datamodule", None)
        tokenizer = getattr(datamodule, "tokenizer", None)
        if self.source.new_tokens and tokenizer is not None:
            require_same_ids(tokenizer, self.source)
        if self._limits is not None and isinstance(datamodule, SupervisedDataModule):
            datamodule.require_model_takes(self._limits, self._new_tokens())

    def _new_tokens(self) -> int:
        """The number of tokens that are generated after prompts; 0 if none are."""
        generates = self.evaluation.generate or self.trainer.state.fn == "predict"
        return self.evaluation.max_new_tokens if generates else 0

    def _require_batch_fits(self, batch: Mapping[str, Any]) -> None:
        # Of the package's own data all is known before training.
        if self._limits is not None:
            self._limits.require_batch(batch, self._new_tokens())

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Measures tokens per second."""
        return [*super().configure_callbacks(), ThroughputCallback()]

    @override
    def metric_names(self) -> set[str]:
        """Names of the metrics that a fit logs and callbacks can monitor."""
        of_answers = ["exact_match", "contains_match"] if self.evaluation.generate else []
        measured = ["loss", "perplexity", "token_accuracy", *of_answers]
        speeds = ["tokens_per_second", "target_tokens_per_second"]
        return {"train/loss", *(f"train/{name}" for name in speeds), *(f"validation/{name}" for name in measured)}

    # ---- training ----

    @override
    def on_train_start(self) -> None:
        """Checks that the logits can be computed as is asked, and that packed records are kept apart.

        Raises:
            ConfigurationError: The model cannot.
        """
        super().on_train_start()
        require_logits(self.peft_model, self.loss.logits)
        if getattr(getattr(self.trainer, "datamodule", None), "packing", False):
            limits = self._limits and self._limits.positions
            require_packable(self.peft_model, limits[0] if limits else None)

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch, a scalar in nats per target token."""
        self._require_batch_fits(batch)
        model = self.peft_model
        sums = token_sums(model, batch, self.loss.logits, count_correct=False)

        def run() -> Any:
            return model(**model_inputs(model, batch), use_cache=False)

        return self._training_loss(sums, batch_idx, len(batch["labels"]), run)

    # ---- checkpoints ----

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the base model out, and puts in where answers end."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] |= {"end_token_ids": self.end_token_ids, "new_tokens": list(self.source.new_tokens)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or LoRA, and ends answers where its data did."""
        super().on_load_checkpoint(checkpoint)
        then, now = checkpoint[CHECKPOINT_KEY].get("new_tokens", []), list(self.source.new_tokens)
        if then != now:
            raise ConfigurationError(
                f"the checkpoint was trained with new_tokens={then} and the current model has {now}; set "
                "model.new_tokens as it was."
            )
        self._end_answers_at(checkpoint[CHECKPOINT_KEY].get("end_token_ids", ()))

    # ---- evaluation ----

    @override
    def _begin_evaluation(self) -> None:
        self.evaluator.begin()

    @override
    def _evaluate(self, batch: Mapping[str, Any]) -> None:
        self._require_batch_fits(batch)
        tokenizer = self._answer_tokenizer() if self.evaluation.generate else None
        self.evaluator.add(self.peft_model, batch, tokenizer, self.trainer.world_size)

    @override
    def _evaluated(self) -> Mapping[str, Any]:
        return self.evaluator.metrics.compute()

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[str]:
        """Generates an answer to each prompt of a batch."""
        self._require_batch_fits(batch)
        return generate_answers(self.peft_model, self._answer_tokenizer(), prompt_inputs(batch), self.evaluation)

    @override
    def _reader(self) -> Any:
        """The processor or tokenizer of the data, or of the model."""
        reader = super()._reader()
        if reader is not None:
            return reader
        try:
            return self._answer_tokenizer()
        except (OSError, ValueError, ImportError, KeyError) as error:
            rank_zero_info(
                f"The model {self.source.name_or_path!r} has no tokenizer that can be loaded ({one_line(error)}), so "
                "the adapter's folder is without one."
            )
            return None

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
                add_tokens(tokenizer, self.source.new_tokens)
            self._tokenizer = tokenizer
        return self._tokenizer
