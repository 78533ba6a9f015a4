"""Cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.output_head import OutputHead, are_same

# Of the logits of a chunk in float32: large enough for fast products, small enough to be of no account.
_CHUNK_BYTES = 1 << 26
# Gradients of logits in float16 are kept off its small numbers; a power of two changes no digit.
_SCALE_OF_HALF = 1024.0
# On which Liger's kernels run.
DEVICES = ("cuda", "xpu")


def tokens_per_chunk(vocabulary: int) -> int:
    """Number of tokens whose logits are held at once, at least 64."""
    return max(64, _CHUNK_BYTES // (4 * vocabulary))


def chunked_cross_entropy(
    head: OutputHead, hidden: Tensor, targets: Tensor, chunk: int | None = None, count_correct: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Sums the negative log-likelihood of targets, chunk by chunk.

    The gradient of a chunk is made from its logits while they are there, as in fused linear cross-entropy, so that the
    backward pass computes nothing again. Sums are taken in float32.

    Args:
        head: Of the model whose last call the hidden states are from.
        hidden: ``[tokens, hidden]``.
        targets: ``[tokens]``, int64, in [0, vocabulary).
        chunk: Number of tokens at once.
        count_correct: Whether to count the targets that are the likeliest.

    Returns:
        The sum in nats, a float32 scalar, with a graph where gradients are enabled; and the number of correct targets,
        an int64 scalar, or None.
    """
    trains = torch.is_grad_enabled()
    parameters = [parameter for parameter in head.root.parameters() if trains and parameter.requires_grad]
    chunk = chunk or tokens_per_chunk(head.rows)
    hidden = hidden if trains else hidden.detach()
    total, correct = _ChunkedSum.apply(head, targets, chunk, count_correct, hidden, *parameters)
    return total, correct if count_correct else None


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: OutputHead,
        targets: Tensor,
        chunk: int,
        count: bool,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[4:]
        total, correct = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        ctx.scale = 1.0
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            part, wanted = hidden[rows].detach(), list(parameters)
            with torch.set_grad_enabled(any(needed)):
                if of_hidden is not None:
                    wanted.insert(0, part.requires_grad_())
                logits = head.logits(part)
            likelihood, gradient = _of_logits(logits.detach(), targets[rows], any(needed))
            total += likelihood
            if count:
                correct += (logits.detach().argmax(dim=-1) == targets[rows]).sum()
            if gradient is None or not logits.requires_grad:
                continue
            if logits.dtype == torch.float16:
                ctx.scale = _SCALE_OF_HALF
            found = list(
                torch.autograd.grad(logits, wanted, (gradient * ctx.scale).to(logits.dtype), allow_unused=True)
            )
            if of_hidden is not None:
                of_hidden[rows] = found.pop(0)
            for index, value in enumerate(found):
                if value is not None:
                    former = sums[index]
                    sums[index] = value.float() if former is None else former.add_(value)
        ctx.save_for_backward(of_hidden, *sums)
        ctx.mark_non_differentiable(correct)
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in parameters)]
        return total, correct

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> Any:
        factor = of_total / ctx.scale
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None,) * 4 + tuple(None if value is None else (value * factor).to(dtype) for value, dtype in saved)


def _of_logits(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the negative log-likelihood, and softmax less one-hot targets, in float32."""
    # In float32, as the sum over a vocabulary loses too much in 16 bits.
    log_probabilities = logits.float().log_softmax(dim=-1)
    places = targets[:, None]
    total = -log_probabilities.gather(1, places).sum()
    if not with_gradient:
        return total, None
    gradient = log_probabilities.exp_()
    return total, gradient.scatter_add_(1, places, gradient.new_full(places.shape, -1.0))


class FusedCrossEntropy:
    """Liger's fused linear cross-entropy on a model's output head.

    Args:
        head: Of the model.

    Raises:
        ConfigurationError: It cannot be used here, or not with this model.
    """

    def __init__(self, head: OutputHead) -> None:
        root: Any = head.root
        layer = root.get_output_embeddings()
        text = root.config.get_text_config()
        self.cap: float | None = getattr(text, "final_logit_softcapping", None)
        name = type(root).__name__
        if type(layer) is not nn.Linear:
            raise ConfigurationError(
                f"loss.logits='fused' takes an output head that is a plain linear layer, and that of {name} is "
                f"{type(layer).__name__}; use 'auto', or leave the head out of the LoRA targets."
            )
        self.layer = layer
        if next(root.parameters()).device.type not in DEVICES:
            raise ConfigurationError("loss.logits='fused' runs on a GPU, and the model is not on one; use 'auto'.")
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError as error:
            raise ConfigurationError(
                "loss.logits='fused' needs the package liger-kernel; install na-lora-lightning[liger], or use 'auto'."
            ) from error
        self._function: Any = liger_fused_linear_cross_entropy
        hidden, logits, _ = head.probe()
        if not are_same(logits, self._logits(hidden)):
            raise ConfigurationError(
                f"loss.logits='fused' knows heads whose logits are capped or left as they are, and {name} does more to "
                "them; use 'auto'."
            )

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden)
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """As :func:`chunked_cross_entropy`, without counts."""
        loss: Tensor = self._function(
            hidden, self.layer.weight, targets, self.layer.bias, reduction="sum", softcap=self.cap
        )
        return loss.float()


_fused: WeakKeyDictionary[OutputHead, FusedCrossEntropy] = WeakKeyDictionary()


def fused_cross_entropy(head: OutputHead) -> FusedCrossEntropy:
    """The fused loss of a head, which is checked once.

    Raises:
        ConfigurationError: It cannot be used here, or not with this model.
    """
    if head not in _fused:
        _fused[head] = FusedCrossEntropy(head)
    return _fused[head]
