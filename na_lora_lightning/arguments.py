"""The options of the module, grouped by what they are about.

Each group is a frozen dataclass that refuses values that cannot work as soon as it is made, so that a mistake shows
before a model is loaded. All fields are plain values: a group can be written to a checkpoint and read back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from na_lora_lightning.errors import ConfigurationError

_REPRODUCIBLE_INITIALISATIONS = ("gaussian", "pissa", "olora", "orthogonal", "eva", "loftq")

Group = TypeVar("Group")


@dataclass(frozen=True)
class LoRAOptions:
    """Which layers get LoRA, and of what kind; the names and meanings of ``peft.LoraConfig``.

    Args:
        r: Rank of the update.
        alpha: The update is scaled by ``alpha / r``, or by ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: Probability with which an element of a LoRA layer's input is dropped in training, in [0, 1).
        target_modules: Names of the layers, a regular expression that matches them, or ``"all-linear"`` for every
            linear layer except the output head.
        exclude_modules: Names of layers, or a regular expression that matches them, to leave out again.
        parts: Of a model for images and text, the parts whose layers may be adapted: ``"language"``, ``"vision"`` (its
            image encoder) and ``"projector"`` (what joins the two).
        layers_to_transform: Indices of the only blocks to adapt; None stands for all.
        target_parameters: Names of parameters that are not the weight of a layer, or ``"all-experts"`` for all experts
            that the model keeps stacked in parameters. They take neither dropout nor DoRA.
        modules_to_save: Names of modules to train in full and save with the adapter.
        trainable_token_indices: Ids of tokens whose embeddings are trained and saved with the adapter, such as those
            of special tokens that the model has never seen; or such ids by the names of modules, ``embed_tokens`` and
            ``lm_head``.
        rank_pattern: Rank by layer name or regular expression, where it is not ``r``.
        alpha_pattern: ``alpha`` by layer name or regular expression, where it is not ``alpha``.
        bias: Which biases train: ``"none"``, ``"all"``, or those of the adapted layers (``"lora_only"``).
        use_rslora: Scale by ``alpha / sqrt(r)`` (rank-stabilised LoRA).
        use_dora: Train each weight's magnitude beside its direction (DoRA).
        init_lora_weights: True starts from no change; ``"gaussian"``, ``"orthogonal"``, ``"pissa"``, ``"olora"`` and
            ``"eva"`` as in PEFT; the last looks at training data when a fit begins. ``"loftq"`` starts from what a
            quantisation to four bits lost, and the adapter then belongs to the base in those. False starts from a
            random change, which is for debugging alone.
        layers: ``"fast"`` computes a layer and what LoRA adds to it in one function, with the same numbers to rounding,
            where :func:`~na_lora_lightning.use_fast_lora_layers` can; ``"peft"`` leaves all to PEFT.

    Raises:
        ConfigurationError: A value is out of range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    parts: list[Literal["language", "vision", "projector"]] = field(default_factory=lambda: ["language"])
    layers_to_transform: list[int] | None = None
    target_parameters: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    layers: Literal["fast", "peft"] = "fast"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigurationError(f"lora.r is {self.r}, and a rank is at least 1; set it to a positive number.")
        if self.alpha <= 0:
            raise ConfigurationError(f"lora.alpha is {self.alpha}, so LoRA would have no effect; set it above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"lora.dropout is {self.dropout}, and it is a probability; set it in [0, 1).")
        if not self.target_modules and not self.target_parameters:
            raise ConfigurationError("lora.target_modules is empty; name the layers to adapt, or use 'all-linear'.")
        if not self.parts or any(part not in ("language", "vision", "projector") for part in self.parts):
            raise ConfigurationError(
                f"lora.parts={self.parts!r} names no part, or an unknown one; use 'language', 'vision' and 'projector'."
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigurationError(f"lora.bias={self.bias!r} is unknown; use 'none', 'all' or 'lora_only'.")
        if self.layers not in ("fast", "peft"):
            raise ConfigurationError(f"lora.layers={self.layers!r} is unknown; use 'fast' or 'peft'.")
        initialisation = self.init_lora_weights
        if isinstance(initialisation, str) and initialisation not in _REPRODUCIBLE_INITIALISATIONS:
            # The others need other data or a random decomposition, so the base weights that they leave behind could not
            # be made again when the adapter is loaded.
            raise ConfigurationError(
                f"lora.init_lora_weights={initialisation!r} is not supported; use true, "
                f"{', '.join(repr(name) for name in _REPRODUCIBLE_INITIALISATIONS)}."
            )
        if initialisation == "loftq" and self.use_dora:
            raise ConfigurationError(
                "lora.use_dora does not go with init_lora_weights='loftq', which begins with a change of the weights; "
                "leave one of the two out."
            )
        if initialisation == "eva" and self.rank_pattern:
            raise ConfigurationError(
                "lora.rank_pattern does not go with init_lora_weights='eva', which gives layers of the same input the "
                "same rank; leave one of the two out."
            )

    @property
    def changes_base_weights(self) -> bool:
        """Whether the initialisation takes what it puts into LoRA out of the base weights."""
        return self.init_lora_weights in ("pissa", "olora")


LogitsOption = Literal["auto", "targets", "chunked", "fused", "all"]


@dataclass(frozen=True)
class LossOptions:
    """How the training loss is computed; none of it changes what is minimised with one micro-batch a step.

    Args:
        logits: Which logits are computed, and held, at once. ``"targets"``: those at positions that some record of
            the batch has a target at; models whose forward has no ``logits_to_keep`` compute all. ``"chunked"``: those
            of the targets alone, 64 MiB of them at a time, whose gradient is taken before the next. ``"fused"``: the
            same in Liger's kernels, for training on a GPU. ``"all"``: all, which keeps shapes static for compilers.
            ``"auto"`` is ``"chunked"`` where the logits of a batch are larger than a chunk and the model's head runs
            by itself, which is tried, and ``"targets"`` elsewhere.
        average_over: ``"step"`` weighs every target token of an optimizer step alike, whatever micro-batch and
            process it is in; ``"micro_batch"`` averages within micro-batches first, so that targets in short ones
            weigh more.
        on_nonfinite: What to do where the loss of a batch is NaN or infinite: ``"stop"`` with an error that names the
            layer where that begins, or ``"skip"`` the optimizer step. ``"skip"`` looks at the gradients as well, waits
            for the device before each step, and works in one process.

    Raises:
        ConfigurationError: A value is unknown.
    """

    logits: LogitsOption = "auto"
    average_over: Literal["step", "micro_batch"] = "step"
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.logits not in get_args(LogitsOption):
            names = ", ".join(map(repr, get_args(LogitsOption)))
            raise ConfigurationError(f"loss.logits={self.logits!r} is unknown; use one of {names}.")
        if self.average_over not in ("step", "micro_batch"):
            raise ConfigurationError(
                f"loss.average_over={self.average_over!r} is unknown; use 'step' or 'micro_batch'."
            )
        if self.on_nonfinite not in ("stop", "skip"):
            raise ConfigurationError(f"loss.on_nonfinite={self.on_nonfinite!r} is unknown; use 'stop' or 'skip'.")


ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over the optimizer steps of a fit.

    Args:
        name: The shape, as ``transformers.get_scheduler`` names it, or the import path of a scheduler of torch or
            transformers, a class or a function of the optimizer, such as ``torch.optim.lr_scheduler.OneCycleLR``.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises from 0, in [0, 1). Classes
            of torch have options of their own for that.
        warmup_steps: The same as a number of steps; takes the place of ``warmup_fraction``.
        options: What the shape takes beyond that, such as ``{"min_lr_rate": 0.1}`` for ``cosine_with_min_lr``, or the
            arguments of what is imported. ``total_steps``, ``num_training_steps`` and ``num_warmup_steps`` are those of
            the fit unless they are given.
        interval: Whether the scheduler counts optimizer steps (``"step"``) or epochs (``"epoch"``).
        monitor: The metric that ``ReduceLROnPlateau`` waits for, such as ``validation/loss``.

    Raises:
        ConfigurationError: A value is out of range.
    """

    name: ScheduleName | str = "cosine"
    warmup_fraction: float = 0.03
    warmup_steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    interval: Literal["step", "epoch"] = "step"
    monitor: str | None = None

    def __post_init__(self) -> None:
        if not self.is_imported and self.name not in get_args(ScheduleName):
            raise ConfigurationError(
                f"schedule.name={self.name!r} is unknown; use one of {', '.join(map(repr, get_args(ScheduleName)))}, "
                "or the import path of a scheduler, such as torch.optim.lr_scheduler.OneCycleLR."
            )
        if self.interval not in ("step", "epoch"):
            raise ConfigurationError(f"schedule.interval={self.interval!r} is unknown; use 'step' or 'epoch'.")
        if not self.is_imported and self.monitor is not None:
            raise ConfigurationError(
                f"schedule.monitor is {self.monitor!r}, and the schedule {self.name!r} looks at no metric; leave it "
                "out, or name torch.optim.lr_scheduler.ReduceLROnPlateau."
            )
        if not self.is_imported and self.interval != "step":
            raise ConfigurationError(
                f"schedule.interval={self.interval!r} does not work with the schedule {self.name!r}, which goes by "
                "optimizer steps; leave it out, or name a scheduler by its import path."
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigurationError(
                f"schedule.warmup_fraction is {self.warmup_fraction}, and it is a fraction; set it in [0, 1)."
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigurationError(
                f"schedule.warmup_steps is {self.warmup_steps}, and it counts steps; set it to 0 or more."
            )

    @property
    def is_imported(self) -> bool:
        """Whether the name is an import path."""
        return "." in self.name


@dataclass(frozen=True)
class EvaluationOptions:
    """What validation and test measure beyond the loss, and how text is generated.

    Args:
        generate: Generate an answer to each prompt and count how many equal their reference, and how many contain it.
        sample_count: Number of records, from the start of the data, to generate answers for; None stands for all.
        max_new_tokens: Longest answer in tokens; also for prediction.
        num_beams: Number of beams; 1 is greedy decoding.
        answer_pattern: Regular expression that finds the answer within a text. Its last match, or the first group of
            that match, is what is compared, in answers and references alike.
        ignore_case: Compare without regard to upper and lower case.

    Raises:
        ConfigurationError: A value is out of range, or the pattern is not a valid regular expression.
    """

    generate: bool = False
    sample_count: int | None = None
    max_new_tokens: int = 64
    num_beams: int = 1
    answer_pattern: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        for name in ("sample_count", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"evaluation.{name} is {value}; set it to at least 1.")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise ConfigurationError(
                f"evaluation.answer_pattern={self.answer_pattern!r} is not a valid regular expression ({error}); "
                "correct it."
            ) from error


@dataclass(frozen=True)
class AdapterOptions:
    """When and where the trained LoRA is written as a plain PEFT adapter folder.

    Args:
        write: ``"last"`` writes what training ended with; ``"best"`` the best checkpoint of the first callback that
            monitors a metric; ``"each"`` every checkpoint too, each over the former; ``"never"`` nothing. The former
            words ``"fit_end"`` and ``"checkpoint"`` stand for ``"last"`` and ``"each"``.
        folder: The folder; None stands for ``adapter`` in the run's log folder.
        start: Folder of an adapter to begin with, or of a run that left one: training goes on from it, and evaluation
            uses it. Options of ``lora`` that have their defaults are then the adapter's own.

    Raises:
        ConfigurationError: A value is unknown.
    """

    write: Literal["last", "best", "each", "never", "fit_end", "checkpoint"] = "last"
    folder: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        now = {"fit_end": "last", "checkpoint": "each"}.get(self.write, self.write)
        if now not in ("last", "best", "each", "never"):
            raise ConfigurationError(f"adapter.write={self.write!r} is unknown; use 'last', 'best', 'each' or 'never'.")
        object.__setattr__(self, "write", now)


def as_group(kind: type[Group], value: Group | Mapping[str, Any], name: str) -> Group:
    """Returns a group of options, made from a mapping if need be (as it is in a checkpoint).

    Args:
        kind: The dataclass.
        value: An instance of it, or its fields by name.
        name: What the user calls the group.

    Returns:
        The instance.

    Raises:
        ConfigurationError: The mapping has a key that the group lacks.
    """
    if not isinstance(value, Mapping):
        return value
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ConfigurationError(f"{name} has no option {unknown[0]!r}; use one of {', '.join(known)}.")
    return kind(**value)


# What these classes were called before.
LoRAArguments = LoRAOptions
LossArguments = LossOptions
ScheduleArguments = ScheduleOptions
EvaluationArguments = EvaluationOptions
AdapterArguments = AdapterOptions
