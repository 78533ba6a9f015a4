"""Which row of ``lora_B`` makes which channel of a pre-activation.

Two ways, each blind where the other sees:

* **Probe**: ∂(Σ_j z_j)/∂B and ∂(Σ_j (j+1)·z_j)/∂B. Row k of the second is (j+1) times row k of the first, where
  j is the channel that row k makes, whatever slicing, chunking, interleaving, clamping or scaling lies between.
* **Storage**: z is a view of the LoRA layer's output; offset and stride give the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A weight of up to 17 is exact in bfloat16 and survives the division of two rounded numbers.
_LOW_PRECISION_BASE = 16
_FULL_PRECISION_BASE = 1 << 20
_ROW_IS_TOUCHED = 1e-6


@dataclass(frozen=True)
class Correspondence:
    """Which channel each row makes.

    Attributes:
        rows: Rows that make a channel, ascending, ``[rows]``, int64 on the CPU.
        channels: The channel that each makes, ``[rows]``, int64 on the CPU.
    """

    rows: Tensor
    channels: Tensor

    def one_to_one(self, channels: int) -> Tensor | None:
        """The row of each channel, ``[channels]``; None where some channel has no row or several."""
        order = self.channels.argsort()
        if not torch.equal(self.channels[order], torch.arange(channels)):
            return None
        return self.rows[order]


def correspondence(pre_activation: Tensor, lora_b: Tensor) -> Correspondence | None:
    """Finds which channel each row of a parameter makes, by vector-Jacobian products.

    Args:
        pre_activation: z, ``[..., channels]``, with a graph that reaches ``lora_b``.
        lora_b: ``[rows, ...]``, such as the LoRA matrix B.

    Returns:
        The rows that z depends on; None where some row makes more than one channel, or z does not reach ``lora_b``.
    """
    channels = pre_activation.shape[-1]
    full = pre_activation.dtype in (torch.float32, torch.float64) and lora_b.dtype in (
        torch.float32,
        torch.float64,
    )
    base = _FULL_PRECISION_BASE if full else _LOW_PRECISION_BASE

    def gradient(weight: Tensor) -> Tensor | None:
        # Contiguous, because the kernels of grouped products take no other.
        cotangent = weight.to(pre_activation).expand_as(pre_activation).contiguous()
        (result,) = torch.autograd.grad(pre_activation, lora_b, cotangent, retain_graph=True, allow_unused=True)
        return None if result is None else result.detach().double().flatten(1)

    index = torch.arange(channels, device=pre_activation.device)
    plain = gradient(torch.ones(channels))
    if plain is None:
        return None
    strength = plain.square().sum(dim=1)
    touched = strength > _ROW_IS_TOUCHED**2 * strength.max()
    if not bool(touched.any()):
        return None
    plain, strength = plain[touched], strength[touched]

    channel_of_row = torch.zeros(strength.numel(), dtype=torch.int64, device=plain.device)
    place = 1
    while place < channels or place == 1:
        digit = (index // place) % base
        weighted = gradient((digit + 1).double())
        if weighted is None:
            return None
        weighted = weighted[touched]
        ratio = (weighted * plain).sum(dim=1) / strength
        rounded = ratio.round()
        misfit = (weighted - ratio[:, None] * plain).norm(dim=1) / (strength.sqrt() * ratio.abs().clamp(min=1.0))
        if bool(((ratio - rounded).abs() > 0.3).any()) or bool((misfit > 0.05).any()):
            return None
        channel_of_row += (rounded.long() - 1) * place
        place *= base
    if bool(((channel_of_row < 0) | (channel_of_row >= channels)).any()):
        return None
    return Correspondence(touched.nonzero()[:, 0].cpu(), channel_of_row.cpu())


def probe_rows(pre_activation: Tensor, lora_b: Tensor) -> Tensor | None:
    """Finds the row of ``lora_b`` for each channel.

    Args:
        pre_activation: z, ``[..., channels]``, with a graph that reaches ``lora_b``.
        lora_b: LoRA matrix B, ``[out_features, r]``.

    Returns:
        Rows, ``[channels]``, int64 on the CPU; None where the rows and channels are not one to one.
    """
    if pre_activation.grad_fn is None:
        return None
    found = correspondence(pre_activation, lora_b)
    return None if found is None else found.one_to_one(pre_activation.shape[-1])


def storage_rows(pre_activation: Tensor, layer_output: Tensor | None) -> Tensor | None:
    """Finds the rows where z is a view of the layer's output.

    Args:
        pre_activation: z, ``[..., channels]``.
        layer_output: Output of the LoRA layer, ``[..., out_features]``, contiguous in its last dimension.

    Returns:
        Rows, ``[channels]``, int64 on the CPU; None where z does not share the output's memory.
    """
    if layer_output is None or layer_output.stride(-1) != 1:
        return None
    if pre_activation.untyped_storage().data_ptr() != layer_output.untyped_storage().data_ptr():
        return None
    out_features = layer_output.shape[-1]
    first = int(pre_activation.storage_offset() - layer_output.storage_offset()) % int(out_features)
    step = pre_activation.stride(-1)
    rows = torch.arange(pre_activation.shape[-1]) * step + first
    return rows if int(rows[-1]) < out_features else None


def positional_rows(pre_activation: Tensor, layer_output: Tensor | None) -> Tensor | None:
    """Rows where channel k comes from output k, and from the other outputs a little, as with learnt sparsity.

    Args:
        pre_activation: z, ``[..., channels]``.
        layer_output: Output of the LoRA layer, ``[..., channels]``, with a graph between the two.

    Returns:
        ``[channels]``, int64 on the CPU; None where the shapes differ, or a channel follows another output more than
        its own.
    """
    if layer_output is None or layer_output.shape != pre_activation.shape:
        return None
    rows = torch.arange(pre_activation.shape[-1])
    alive = (pre_activation != 0).flatten(0, -2)
    for channel in rows[:: max(1, len(rows) // 16)].tolist():
        tokens = alive[:, channel].nonzero()
        if not len(tokens):
            continue
        cotangent = torch.zeros(pre_activation.shape, device=pre_activation.device, dtype=pre_activation.dtype)
        cotangent.view(-1, len(rows))[tokens[0, 0], channel] = 1.0
        (gradient,) = torch.autograd.grad(pre_activation, layer_output, cotangent, retain_graph=True, allow_unused=True)
        if gradient is None or int(gradient.abs().flatten(0, -2).sum(dim=0).argmax()) != channel:
            return None
    return rows
