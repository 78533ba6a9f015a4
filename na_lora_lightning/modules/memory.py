"""The memory that a training step takes, measured on a model without weights.

The step is run as training runs it, forward and backward, with LoRA as it is computed, chunks of logits and recomputed
blocks, on tensors that have shapes and no numbers. Each operation's results are counted from when it makes them until
nothing holds them any more, and the most that is held at once is the answer: nothing has to be known of the model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from na_lora_lightning.arguments import LogitsOption, LoRAOptions
from na_lora_lightning.core.model_entry import root_of, vocabulary_size
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.labels import IGNORED_LABEL
from na_lora_lightning.models.loading import enable_gradient_checkpointing
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.output_head import assume_output_head
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.models.weightless import model_without_weights
from na_lora_lightning.modules.losses import token_sums


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment of a training step at which most are held.

    Attributes:
        peak: All of them.
        weights: Of the base model.
        adapters: What LoRA trains.
        gradients: Of what it trains.
        optimizer: AdamW's two averages of each gradient.
        logits: And what the loss makes of them.
        activations: The rest.
    """

    peak: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    logits: int
    activations: int

    def __str__(self) -> str:
        """The peak and its parts, the largest first."""
        parts = {name: value for name, value in vars(self).items() if name != "peak"}
        names = sorted(parts, key=lambda name: -parts[name])
        return f"{_size(self.peak)}: {', '.join(f'{name} {_size(parts[name])}' for name in names)}"


def _size(count: int) -> str:
    mebibytes = count / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1000 else f"{mebibytes:.3g} MiB"


def batch_of_size(records: int, length: int, example: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A batch of texts that are all targets, one of them a token shorter than the others, so that there is padding.

    Args:
        records: Number of them.
        length: Tokens of each.
        example: The model's inputs of one record that is to be in each, with its images; no shorter than it.

    Returns:
        A batch as :func:`estimate_memory` takes it.
    """
    example = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)} if example is None else example
    ids = example["input_ids"]
    # What follows an example is more of its last token.
    ids = functional.pad(ids, (0, max(0, length - ids.shape[1])), value=int(ids[0, -1])).repeat(records, 1)
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    images = {
        name: value.repeat(records, *[1] * (value.ndim - 1))
        for name, value in example.items()
        if name not in ("input_ids", "attention_mask", "labels")
    }
    return {**images, "input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), IGNORED_LABEL)}


def estimate_memory(
    source: BaseModelSource,
    lora: LoRAOptions,
    batch: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    logits: LogitsOption = "auto",
    gradient_checkpointing: bool | Literal["offload"] = False,
    device: str = "cpu",
    quantized: str | None = None,
) -> MemoryEstimate:
    """Measures a training step of a model of which only the configuration is read.

    Args:
        source: Which model.
        lora: What is trained.
        batch: As :func:`~na_lora_lightning.modules.losses.token_sums` takes it, on the CPU.
        dtype: Of the base weights.
        logits: As in :class:`~na_lora_lightning.arguments.LossOptions`.
        gradient_checkpointing: As in :class:`~na_lora_lightning.modules.language.NALoRALightningModule`.
        device: On which the step is to run; it must be there.
        quantized: In what form the weights of linear layers are held, such as ``"nf4"``.

    Returns:
        The estimate, of AdamW and batches of that size. The process itself, with the libraries that it loads, is not in
        it, nor is what kernels and allocators take beyond what they are asked for.

    Raises:
        ConfigurationError: The model cannot be run without its numbers, or the options do not fit it.
    """
    base = model_without_weights(source, dtype)
    saved = 0
    if quantized:
        head = base.get_output_embeddings()
        linear = [module.weight for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
        # With a scale for each block of 64 weights, where there are blocks.
        bits = 4.5 if "4" in str(quantized) else 8
        saved = sum(int(weight.numel() * (weight.itemsize - bits / 8)) for weight in linear)
    if gradient_checkpointing:
        enable_gradient_checkpointing(base, offload=gradient_checkpointing == "offload")
    found = measure_step(add_lora(base, lora, source), batch, logits, device)
    return replace(found, peak=found.peak - saved, weights=found.weights - saved)


def measure_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    logits: LogitsOption = "auto",
    device: str = "cpu",
) -> MemoryEstimate:
    """Measures a training step of a model on the meta device, as :func:`estimate_memory` does.

    Args:
        model: With LoRA; its parameters are replaced.
        batch: As :func:`estimate_memory` takes it.
        logits: As :func:`estimate_memory` takes it.
        device: As :func:`estimate_memory` takes it.
    """
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    _give_places(model, FakeTensorMode(allow_non_fake_inputs=True), device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vocabulary = vocabulary_size(root_of(model))
    if vocabulary is not None:
        assume_output_head(model, vocabulary)
    ledger = _Ledger(vocabulary)
    with ledger:
        ledger.add([*model.parameters(), *model.buffers()])
        weights = ledger.held
        # What the steps before have left: gradients, and their averages.
        averages = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        # What fails is told below.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            loss = token_sums(model, batch, logits, count_correct=False).mean_loss
            model.zero_grad()
            loss.backward()
        except Exception as error:  # Models are of many kinds, and each fails in a way of its own.
            raise ConfigurationError(
                f"the memory of a step cannot be estimated, as {type(root_of(model)).__name__} does not run on shapes "
                f"alone ({one_line(error).rstrip('.')})."
            ) from error
        finally:
            log.setLevel(level)
    adapters = sum(parameter.nbytes for parameter in trained)
    parts = {
        "weights": weights - adapters,
        "adapters": adapters,
        "gradients": adapters,
        "optimizer": sum(average.nbytes for average in averages),
        "logits": ledger.logits_at_peak,
    }
    return MemoryEstimate(ledger.peak, **parts, activations=max(0, ledger.peak - sum(parts.values())))


# Which older versions of torch lack.
_GROUPED_PRODUCT: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


class _Ledger(TorchDispatchMode):
    """Counts the bytes that tensors without numbers would hold."""

    def __init__(self, vocabulary: int | None) -> None:
        super().__init__()
        self.held = self.peak = self.logits_at_peak = 0
        self._vocabulary = vocabulary
        self._logits = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, tensors: Any) -> None:
        """Counts storages that are not counted yet, until they are freed."""
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known.add(storage)
            size, is_logits = storage.nbytes(), bool(tensor.ndim and tensor.shape[-1] == self._vocabulary)
            self._count(size, is_logits)
            weakref.finalize(storage, self._count, -size, is_logits)
        if self.held > self.peak:
            self.peak, self.logits_at_peak = self.held, self._logits

    def _count(self, size: int, is_logits: bool) -> None:
        self.held += size
        self._logits += size * is_logits

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it makes."""
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Checks of values that nobody knows pass.
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if function is _GROUPED_PRODUCT and args[0].dtype == torch.float32:
            # On shapes alone torch refuses what its kernels take.
            half = (arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
            result = function(*half, **(kwargs or {})).float()
        else:
            result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def _give_places(model: nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Puts tensors without numbers on a device in the place of those on the meta device; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}

    def place(tensor: Tensor) -> Tensor:
        if tensor not in made:
            with mode:
                made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = place(tensor)  # type: ignore[assignment]
