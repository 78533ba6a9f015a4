"""The LightningModule for dual encoders of images and texts: classification by prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, LossOptions, ScheduleOptions, as_group
from na_lora_lightning.checkpoints.adapter_state import CHECKPOINT_KEY
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import attached_trainer
from na_lora_lightning.models.dual_encoder import (
    EncoderPart,
    add_lora_to_encoders,
    average_templates,
    class_logits,
    class_prompts,
    encode_prompts,
    example_inputs,
    load_dual_encoder,
    lora_parts,
    trains_texts,
)
from na_lora_lightning.models.loading import enable_gradient_checkpointing
from na_lora_lightning.models.sharding import shards_model
from na_lora_lightning.models.source import BaseModelSource, Dtype
from na_lora_lightning.modules.losses import TokenSums
from na_lora_lightning.modules.optimization import OptimizerFactory
from na_lora_lightning.modules.training import AdapterTrainingModule

LABEL = "label"
_PROMPTS = ("input_ids", "attention_mask")


class DualEncoderLightningModule(AdapterTrainingModule):
    """Fine-tunes a CLIP, SigLIP or SigLIP 2 model with LoRA to classify images by prompts.

    Each class is described by a prompt, or by several whose features are averaged. An image's logits are its cosine
    similarities to the classes, times the model's logit scale, plus SigLIP's logit bias. The loss is the cross-entropy
    over the classes, as in few-shot protocols, for SigLIP too, whose sigmoid loss is for pairs without classes (its
    bias then cancels). Text features are computed in each training step where the text encoder has LoRA, else once.

    A training step calls the model once, with images and prompts, so that
    :class:`~na_lora_lightning.callbacks.gate_importance.GateImportanceCallback` and
    :class:`~na_lora_lightning.callbacks.step_scale.StepScaleCallback` see both encoders: the text sites over the
    tokens of the prompts, the vision sites over the patches of the images. Where ``parts`` leaves an encoder out, they
    need ``allow_unmasked_gates=True``.

    A batch has what the image processor made (``pixel_values``, ...) and ``label``, ``[batch]`` int64, an index into
    :attr:`class_names`. Logged are ``train/loss``, and ``loss`` and ``accuracy`` of validation and test.

    Args:
        model_name_or_path: Folder of a model with its processor, or its name on the Hugging Face hub.
        class_names: What the classes are called; None takes those of the data module (its ``class_names``), or of the
            checkpoint that is loaded.
        templates: Prompts with ``{}`` for the class; the features of several are averaged.
        parts: The parts that are adapted: ``"text"`` and ``"vision"`` (the encoders), and ``"projection"`` (the
            projections of CLIP into the common space).
        lora: Which layers get LoRA, and of what kind; leave its ``parts`` alone.
        optimizer: Makes the optimizer from the trainable parameters.
        schedule: Learning rate over the optimizer steps.
        adapter: When and where the adapter is written as a PEFT folder.
        dtype: Of the base weights; ``"auto"`` is the checkpoint's own on a CUDA device and float32 elsewhere.
        attention_implementation: As transformers names it (``"sdpa"``, ``"eager"``, ...).
        gradient_checkpointing: Recompute activations in the backward pass.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether a model from the hub may run code of its own.

    Raises:
        ConfigurationError: An argument has a value that cannot work.

    Example::

        module = DualEncoderLightningModule("openai/clip-vit-base-patch16", lora=LoRAOptions(r=4, alpha=4))
        data = LabelledImageDataModule("openai/clip-vit-base-patch16", train="flowers/train", shots=4)
        Trainer(max_epochs=50, callbacks=[GateImportanceCallback()]).fit(module, data)
    """

    def __init__(
        self,
        model_name_or_path: str,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        parts: Sequence[EncoderPart] = ("text", "vision"),
        lora: LoRAOptions = LoRAOptions(),
        optimizer: OptimizerFactory = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        schedule: ScheduleOptions = ScheduleOptions(),
        adapter: AdapterOptions = AdapterOptions(),
        dtype: Dtype = "auto",
        attention_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            BaseModelSource(model_name_or_path, revision, trust_remote_code, dtype, attention_implementation),
            lora=lora_parts(parts, as_group(LoRAOptions, lora, "lora")),
            optimizer=optimizer,
            schedule=schedule,
            loss=LossOptions(),
            adapter=adapter,
            gradient_checkpointing=gradient_checkpointing,
        )
        class_prompts(("class",), templates)
        self.templates = list(templates)
        self.class_names: list[str] | None = None if class_names is None else list(class_names)
        self._names_are_given = class_names is not None
        own = {"class_names": self.class_names, "templates": self.templates, "parts": list(parts)}
        self.save_hyperparameters({**own, "lora": asdict(replace(self.lora, parts=LoRAOptions().parts))})
        self.accuracy: MulticlassAccuracy | None = None
        self.mean_loss = MeanMetric()
        for name in _PROMPTS:
            self.register_buffer(name, None, persistent=False)
        self._class_features: Tensor | None = None
        self._trains_texts = True

    # ---- model ----

    @override
    def setup(self, stage: str) -> None:
        """Takes the classes of the data module.

        Raises:
            ConfigurationError: They are others than those given, or there are none.
        """
        super().setup(stage)
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if self._names_are_given and names is not None and list(names) != self.class_names:
            raise ConfigurationError(
                f"the module was given the classes {self.class_names} and the data has {list(names)}; give class_names "
                "to the data module alone."
            )
        self.class_names = self.class_names if names is None else list(names)
        if self.class_names is None and stage != "predict":
            raise ConfigurationError(
                "there are no classes to make prompts of, neither of the module nor of its data; set class_names."
            )
        if self.model is not None and self.class_names is not None:
            self._prepare_prompts()

    @override
    def configure_model(self) -> None:
        """Loads the base model and adds LoRA, once."""
        if self.model is not None:
            return
        if attached_trainer(self) is not None and shards_model(self.trainer):
            raise ConfigurationError(
                f"{type(self).__name__} does not shard its model; use a single device or strategy='ddp'."
            )
        base = load_dual_encoder(self.source, self._training_device)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(base)
        self.model = self._start_adapter(add_lora_to_encoders(base, self.lora, self.source))
        self._trains_texts = trains_texts(self.model)
        if self.class_names is not None:
            self._prepare_prompts()

    def _prepare_prompts(self) -> None:
        """Tokenises the prompts of the classes, and makes what depends on their number."""
        assert self.class_names is not None
        config = self.peft_model.get_base_model().config
        prompts = encode_prompts(self._reader().tokenizer, config, class_prompts(self.class_names, self.templates))
        for name in _PROMPTS:
            value = prompts.get(name)
            self.register_buffer(name, None if value is None else value.to(self.device), persistent=False)
        self.example_inputs = example_inputs(config, prompts)
        self.accuracy = MulticlassAccuracy(len(self.class_names), average="micro").to(self.device)
        self._class_features = None

    @override
    def _reader(self) -> Any:
        source = self.source
        return load_processor(
            source.resolved_name_or_path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )

    def class_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores of the images of a batch for the classes.

        Args:
            batch: As the data module makes it; ``label`` is not needed.

        Returns:
            ``[batch, classes]``, float32.

        Raises:
            ConfigurationError: There are no classes yet.
        """
        model = self.peft_model
        prompts = self._prompts()
        images = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != LABEL}
        if torch.is_grad_enabled() and self._trains_texts:
            self._class_features = None
            output = model(**prompts, **images)
            class_features = average_templates(output.text_embeds, len(self.templates))
        else:
            class_features = self._constant_class_features(images)
            # The model wants a text with its images; the shortest way is one.
            output = model(**{name: value[:1] for name, value in prompts.items()}, **images)
        return class_logits(model.get_base_model(), output.image_embeds, class_features)

    def _prompts(self) -> dict[str, Tensor]:
        prompts = {name: self.get_buffer(name) for name in _PROMPTS if self._buffers[name] is not None}
        if not prompts:
            raise ConfigurationError("the module has no classes yet; give class_names, or use a Trainer with data.")
        return prompts

    @torch.no_grad()
    def _constant_class_features(self, images: Mapping[str, Tensor]) -> Tensor:
        """Features of the classes, ``[classes, features]``, from one pass for as long as weights stay."""
        if self._class_features is None:
            model = self.peft_model
            training = model.training
            output = model.eval()(**self._prompts(), **{name: value[:1] for name, value in images.items()})
            model.train(training)
            self._class_features = average_templates(output.text_embeds, len(self.templates))
        features = self._class_features
        # Validation leaves a tensor that training could not save for its backward pass.
        return features.clone() if features.is_inference() else features

    # ---- training ----

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch, a scalar in nats per image."""
        return self._training_loss(self._sums(batch), batch_idx, len(batch[LABEL]), lambda: self._sums(batch))

    def _sums(self, batch: Mapping[str, Any]) -> TokenSums:
        """Loss and correct answers of a batch, an image being one target."""
        logits, label = self.class_logits(batch), batch[LABEL]
        loss = functional.cross_entropy(logits, label, reduction="sum")
        return TokenSums(loss, torch.tensor(len(label)).to(label), (logits.argmax(dim=-1) == label).sum())

    # ---- evaluation ----

    @override
    def metric_names(self) -> set[str]:
        """Names of the metrics that a fit logs and callbacks can monitor."""
        return {"train/loss", "validation/accuracy", "validation/loss"}

    @override
    def _begin_evaluation(self) -> None:
        self._metrics().reset()
        self.mean_loss.reset()

    @override
    def _evaluate(self, batch: Mapping[str, Any]) -> None:
        logits, label = self.class_logits(batch), batch[LABEL]
        self._metrics().update(logits, label)
        self.mean_loss.update(functional.cross_entropy(logits, label, reduction="none"))

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[str]:
        """Names the class of each image of a batch."""
        best = self.class_logits(batch).argmax(dim=-1).tolist()
        assert self.class_names is not None
        return [self.class_names[index] for index in best]

    def _metrics(self) -> MulticlassAccuracy:
        assert self.accuracy is not None
        return self.accuracy

    @override
    def _evaluated(self) -> Mapping[str, Any]:
        return {"accuracy": self._metrics().compute(), "loss": self.mean_loss.compute()}

    # ---- checkpoints ----

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the base model out, and puts the classes in."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["class_names"] = self.class_names

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or LoRA, and takes its classes where there are none."""
        super().on_load_checkpoint(checkpoint)
        if self.class_names is None and (names := checkpoint[CHECKPOINT_KEY].get("class_names")) is not None:
            self.class_names = list(names)
            self._prepare_prompts()

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads an adapter, or a whole state dict.

        Raises:
            ConfigurationError: The adapter's tensors are not exactly those of this model.
        """
        self._class_features = None
        return super().load_state_dict(state_dict, strict, assign)
