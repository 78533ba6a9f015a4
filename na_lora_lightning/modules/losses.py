"""The causal language-modelling loss over the target tokens of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.arguments import LogitsOption
from na_lora_lightning.core.model_entry import root_of, vocabulary_size
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.labels import IGNORED_LABEL
from na_lora_lightning.models.output_head import OutputHead, output_head
from na_lora_lightning.modules.chunked_loss import chunked_cross_entropy, fused_cross_entropy, tokens_per_chunk

# Not inputs, or asked for in another way.
_NO_EXTRA = ("input_ids", "attention_mask", "labels", "logits_to_keep", "use_cache")


@dataclass(frozen=True)
class TokenSums:
    """Sums over the target tokens of a batch, from which every mean of it follows.

    Attributes:
        negative_log_likelihood: Scalar, float32, nats, with its graph.
        target_tokens: Scalar, int64.
        correct_tokens: Scalar, int64; targets that the model finds most likely. None where they are not counted.
    """

    negative_log_likelihood: Tensor
    target_tokens: Tensor
    correct_tokens: Tensor | None

    @property
    def mean_loss(self) -> Tensor:
        """Scalar, nats per target token; 0 with a graph where there is no target."""
        return self.negative_log_likelihood / self.target_tokens.clamp(min=1)


def target_positions(labels: Tensor) -> Tensor:
    """Positions whose logits predict a target of at least one record.

    The logits at position ``p`` predict the label at ``p + 1``.

    Args:
        labels: ``[batch, length]``, int64, -100 off target.

    Returns:
        ``[positions]``, int64, ascending; position 0 alone where there is no target, as no head takes an empty input
        for granted.
    """
    positions = (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    return positions if positions.numel() else positions.new_zeros(1)


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the Hugging Face model inside a PEFT model can leave out logits."""
    return "logits_to_keep" in _accepted(model)


def _accepted(model: Any) -> Container[str]:
    """Names of the arguments that the Hugging Face model inside a PEFT model takes."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return inspect.signature(base.forward).parameters


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model is called with.

    Args:
        model: A PEFT model.
        batch: ``input_ids``, ``attention_mask`` or, of packed records, ``position_ids``, and, for a model that takes
            images, whatever its processor makes of them (``pixel_values``, ``image_grid_thw``, ...). Labels and what
            the model does not take are left out.

    Returns:
        Keyword arguments.
    """
    accepted = _accepted(model)
    extra = {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and name in accepted and name not in _NO_EXTRA
    }
    # Packed records are told apart by their position ids, which a mask would have transformers overlook.
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return {**given, **extra}


def token_sums(
    model: Any, batch: Mapping[str, Any], logits: LogitsOption = "auto", count_correct: bool = True
) -> TokenSums:
    """Runs the model on a batch and sums over its target tokens.

    Args:
        model: Called with what of the batch it takes as keywords; returns an output with ``logits``.
        batch: ``input_ids``, ``attention_mask`` (or ``position_ids``) and ``labels``, each ``[batch, length]`` and
            int64, and for a model that takes images what its processor makes of them.
        logits: As in :class:`~na_lora_lightning.arguments.LossOptions`.
        count_correct: Whether to count the targets that the model finds most likely.

    Returns:
        The sums. Auxiliary losses that a model may add to its own loss are not in them.

    Raises:
        ConfigurationError: The model's logits cannot be computed as is asked.
    """
    labels = batch["labels"]
    inputs = {**model_inputs(model, batch), "use_cache": False}
    if logits in ("auto", "chunked", "fused"):
        # Where each target is predicted, counted over the batch.
        places = functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten().nonzero().squeeze(1)
        head = _head_for(model, logits, places.numel())
        if head is not None:
            targets = labels.flatten()[places + 1]
            try:
                hidden = head.hidden_states(model, inputs).flatten(0, 1).index_select(0, places)
                if logits == "fused" and torch.is_grad_enabled() and not count_correct:
                    total, correct = fused_cross_entropy(head)(hidden, targets), None
                else:
                    total, correct = chunked_cross_entropy(head, hidden, targets, count_correct=count_correct)
            finally:
                head.forget()
            return TokenSums(total, torch.full_like(total, len(targets), dtype=torch.int64), correct)
    found, targets = logits_of_targets(model, inputs, labels, every_position=logits == "all")
    found = found.flatten(0, 1)
    targets = targets.flatten()
    # In float32, as the sum over a vocabulary loses too much in 16 bits.
    negative_log_likelihood = functional.cross_entropy(
        found.float(), targets, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    with torch.no_grad():
        is_target = targets != IGNORED_LABEL
        correct = ((found.argmax(dim=-1) == targets) & is_target).sum() if count_correct else None
    return TokenSums(negative_log_likelihood, is_target.sum(), correct)


def logits_of_targets(
    model: Any, inputs: Mapping[str, Any], labels: Tensor, every_position: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs a model, if it can at the positions alone that predict a target of some record.

    Args:
        model: A PEFT model.
        inputs: What it is called with.
        labels: ``[batch, length]``, int64, -100 off target.
        every_position: Compute the logits at all positions.

    Returns:
        Logits ``[batch, positions, vocabulary]`` and what they predict, ``[batch, positions]``, -100 off target.
    """
    if every_position or not accepts_logits_to_keep(model):
        return model(**inputs).logits[:, :-1], labels[:, 1:]
    positions = target_positions(labels)
    found = model(**inputs, logits_to_keep=positions).logits
    if found.shape[1] != positions.numel():
        # The model takes the argument and leaves it unused in training.
        found = found[:, positions]
    return found, labels[:, 1:][:, positions] if labels.shape[1] > 1 else torch.full_like(labels, IGNORED_LABEL)


def require_logits(model: nn.Module, logits: LogitsOption) -> None:
    """Checks that a model's logits can be computed as is asked.

    Raises:
        ConfigurationError: They cannot.
    """
    if logits in ("chunked", "fused"):
        head = _head_for(model, logits, 1)
        if logits == "fused" and head is not None:
            fused_cross_entropy(head)


def _head_for(model: nn.Module, logits: LogitsOption, targets: int) -> OutputHead | None:
    """The output head, if it is to run by itself on that many targets."""
    vocabulary = vocabulary_size(root_of(model))
    if not targets or (logits == "auto" and (vocabulary is None or targets <= tokens_per_chunk(vocabulary))):
        return None
    head = output_head(model)
    if isinstance(head, OutputHead):
        return head
    if logits == "auto":
        return None
    raise ConfigurationError(
        f"loss.logits={logits!r} runs the output head by itself, which {type(root_of(model)).__name__} does not allow, "
        f"as {head}; use 'auto'."
    )


class StepAverage:
    """Makes the loss of an optimizer step the mean over all its target tokens.

    Lightning divides the loss of each of N micro-batches by N, and distributed strategies average gradients over W
    processes. So the loss of each micro-batch is its sum divided by the same number c (the first micro-batch's targets
    per process), and before the optimizer steps the gradients are multiplied by N·c/T, T being all targets of the
    step divided by W. With one micro-batch c = T, and the gradients are left as they are.

    Args:
        all_reduce_mean: Averages a tensor over processes; None for one process.
    """

    def __init__(self, all_reduce_mean: Callable[[Tensor], Tensor] | None = None) -> None:
        self._all_reduce_mean = all_reduce_mean
        self._divisor: Tensor | None = None
        self._targets: Tensor | None = None
        self._micro_batches = 0

    def loss(self, sums: TokenSums) -> Tensor:
        """The scalar to backpropagate for a micro-batch."""
        targets = sums.target_tokens.float()
        if self._all_reduce_mean is not None:
            targets = self._all_reduce_mean(targets)
        self._micro_batches += 1
        if self._divisor is None or self._targets is None:
            self._divisor, self._targets = targets.clamp(min=1), targets
        else:
            self._targets = self._targets + targets
        return sums.negative_log_likelihood / self._divisor

    @torch.no_grad()
    def finish_step(self, parameters: list[nn.Parameter], accumulated_batches: int) -> None:
        """Corrects the gradients of a step and begins the next.

        Args:
            parameters: Those that the optimizer is about to step.
            accumulated_batches: N, the number that Lightning divided each loss by.
        """
        divisor, targets, micro_batches = self._divisor, self._targets, self._micro_batches
        self._divisor = self._targets = None
        self._micro_batches = 0
        if divisor is None or targets is None or (micro_batches == 1 and accumulated_batches == 1):
            return
        scale = accumulated_batches * divisor / targets.clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.device))
