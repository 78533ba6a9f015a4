"""Models made from their configuration alone, in which gates can be found without any weights.

Which channel comes from which LoRA row depends on a model's code and sizes, not on its weights. So linear layers and
embeddings answer with noise of the right shape and hold nothing, and what little else a forward pass needs is filled
in: a model of any size is looked at in the memory of its activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from na_lora_lightning.core.experts import expert_owners, stacked_parameters
from na_lora_lightning.core.lora_layers import active_adapters, is_linear, is_lora_layer, lora_a, lora_b, scaling
from na_lora_lightning.core.pre_activations import GATE_METHOD
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.new_tokens import make_room, token_ids
from na_lora_lightning.models.source import BaseModelSource, auto_class, load_config, require_model
from na_lora_lightning.models.targets import mark_transposed_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOISE = 0.3
_SMALL = 1 << 20


def model_without_weights(source: BaseModelSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes a causal language model of a configuration on the meta device.

    Args:
        source: Which model; only its configuration is read, and its tokenizer if it has new tokens.
        dtype: Of its weights.

    Returns:
        The model, to which LoRA can be added; it cannot run before :func:`fill_in`.

    Raises:
        ConfigurationError: There is no such model, or its configuration is not that of a causal language model.
    """
    require_model(source)
    try:
        config = load_config(source)
        # Quantisation concerns weights, and its layers need kernels.
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:
        # Values of the wrong kind go wrong wherever a model's code meets them.
        raise ConfigurationError(
            f"the model {source.name_or_path!r} cannot be made from its configuration ({one_line(error)}); give a "
            "causal language model, or one for images and text."
        ) from error
    make_room(model, token_ids(source))
    model.name_or_path = source.resolved_name_or_path
    mark_transposed_experts(model)
    return model.eval()


def fill_in(model: nn.Module) -> None:
    """Makes a model on the meta device able to run, with noise in the place of every large product.

    Args:
        model: A model on the meta device, with or without LoRA; changed in place.
    """
    generator = torch.Generator().manual_seed(0)
    adapters = {
        matrix
        for layer in model.modules()
        if is_lora_layer(layer)
        for matrices in (layer.lora_A, layer.lora_B)
        for matrix in matrices.values()  # type: ignore[operator]
    }
    # LoRA's own matrices must compute, and so must layers whose weight PEFT adapts as a parameter.
    for _, owner, wrappers in expert_owners(model):
        if hasattr(owner, GATE_METHOD) and hasattr(owner, "has_gate"):
            _answer_low_rank(owner, [wrapper for _, wrapper in wrappers], generator)
    computing = adapters | {m.get_base_layer() for m in model.modules() if hasattr(m, "parameter_name")}  # type: ignore[operator]
    for module in model.modules():
        if is_linear(module) and module not in computing:
            _answer_with_noise(module, generator)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                own_memory = module in adapters or parameter.numel() <= _SMALL
                value = _value_like(parameter, generator, own_memory)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                # Integers are indices into tables.
                indices = not (buffer.is_floating_point() or buffer.dtype == torch.bool)
                module._buffers[name] = (torch.zeros if indices else torch.ones)(buffer.shape, dtype=buffer.dtype)


def _answer_with_noise(layer: nn.Module, generator: torch.Generator) -> None:
    out_features = int(layer.out_features if isinstance(layer, nn.Linear) else layer.nf)  # type: ignore[arg-type]

    def forward(inputs: Tensor) -> Tensor:
        noise = torch.randn(*inputs.shape[:-1], out_features, generator=generator).to(inputs) * _NOISE
        # Token by token it depends on what it was given, as the layer's answer does.
        return noise + _NOISE * inputs.mean(dim=-1, keepdim=True)

    # A model's own kind of linear layer may return something else.
    if type(layer).forward is nn.Linear.forward or not isinstance(layer, nn.Linear):
        layer.forward = forward


def _answer_low_rank(owner: nn.Module, wrappers: list[nn.Module], generator: torch.Generator) -> None:
    """Has experts of transformers' common kind compute LoRA's part of their products alone.

    The adapted weights of all experts of one layer can be larger than many a whole model.
    """
    first, *_ = stacked_parameters(owner)
    wrapper = next((w for w in wrappers if w.parameter_name == first), None)
    shape = stacked_parameters(owner)[first].shape
    out_features = shape[2] if owner.is_transposed else shape[1]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        expert, order = torch.sort(top_k_index.reshape(-1))
        inputs = hidden_states[order // top_k_index.shape[-1]]
        product = torch.randn(len(expert), int(out_features), generator=generator) * _NOISE
        for adapter in () if wrapper is None else active_adapters(wrapper):
            weight_a: Tensor = lora_a(wrapper, adapter).weight  # type: ignore[arg-type, assignment]
            weight_b: Tensor = lora_b(wrapper, adapter).weight  # type: ignore[arg-type, assignment]
            inner = torch.einsum("sri,si->sr", weight_a.view(shape[0], -1, weight_a.shape[1])[expert], inputs)
            own_columns = weight_b.view(weight_b.shape[0], -1, shape[0])[:, :, expert]
            product = product + scaling(wrapper, adapter) * torch.einsum("ors,sr->so", own_columns, inner)  # type: ignore[arg-type]
        if owner.has_gate:
            getattr(owner, GATE_METHOD)(product)
        else:
            owner.act_fn(product)  # type: ignore[operator]
        return hidden_states * _NOISE

    owner.forward = forward
    for outer in wrappers:
        outer.forward = cast(nn.Module, outer.base_layer).__call__


def _value_like(parameter: nn.Parameter, generator: torch.Generator, own_memory: bool) -> Tensor:
    """Values for a parameter; of a matrix, or several, one row in the place of all, which takes no memory."""
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    if parameter.ndim < 2:
        return torch.ones(parameter.shape, dtype=parameter.dtype)
    if own_memory:
        return torch.randn(parameter.shape, generator=generator) * _NOISE
    row = torch.randn(parameter.shape[-1], generator=generator, dtype=parameter.dtype) * _NOISE
    return row.expand(parameter.shape)
