"""Finds the network with LoRA inside somebody's LightningModule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from na_lora_lightning.core.lora_layers import is_lora_layer
from na_lora_lightning.errors import ConfigurationError, DiscoveryError, NALoRAError
from na_lora_lightning.lightning_internals import BACK_REFERENCES

# What torch and Lightning keep of their own on a module.
_BOOKKEEPING = ("_modules", "_parameters", "_buffers", *BACK_REFERENCES)
_DEEPEST = 3


def find_peft_model(pl_module: nn.Module) -> nn.Module:
    """Finds the network with LoRA anywhere inside a LightningModule.

    Args:
        pl_module: The module to search.

    Returns:
        Its only ``PeftModel``, or, of several, the only one whose LoRA is trained. Where LoRA layers were injected
        without a ``PeftModel``: the outermost Hugging Face model that holds them, else the outermost network inside of
        the LightningModule, else the LightningModule itself where it calls them in its own ``forward``.

    Raises:
        DiscoveryError: There is none, or Lightning does not see it.
        ConfigurationError: There are several.
    """
    networks = _networks(pl_module)
    trained = {name: network for name, network in networks.items() if _trains_lora(network)}
    if len(networks) > 1 and len(trained) == 1:
        # A frozen reference or teacher beside the model that is trained.
        networks = trained
    owner = type(pl_module).__name__
    if len(networks) > 1:
        names = ", ".join(name or "itself" for name in sorted(networks))
        raise ConfigurationError(
            f"{owner} holds {len(networks)} PEFT models ({names}), so whose gates are meant is unclear; train the LoRA "
            "of one of them and freeze the others, or join them in one nn.Module before LoRA is added."
        )
    if networks:
        name, network = next(iter(networks.items()))
        _require_forward(name, network)
        return network
    hidden = next(_hidden_networks(pl_module), None)
    if hidden is not None:
        raise DiscoveryError(
            f"{owner}.{hidden} holds a PEFT model where Lightning does not see it, inside a plain list, dictionary or "
            "object; assign it to an attribute of its own, or use nn.ModuleList or nn.ModuleDict."
        )
    raise DiscoveryError(
        f"{owner} holds no PEFT model; wrap the network with peft.get_peft_model(...) and assign it to an attribute of "
        "the LightningModule (not inside a plain list or dict) in __init__, setup or configure_model."
    )


def explain_missing_parameters(pl_module: nn.Module, exception: BaseException) -> None:
    """Says why an optimizer without parameters has none: it is made before callbacks can look at the model."""
    if isinstance(exception, ValueError) and "empty parameter list" in str(exception):
        try:
            find_peft_model(pl_module)
        except NALoRAError as reason:
            rank_zero_warn(str(reason))


def _is_peft_model(module: nn.Module) -> bool:
    # By its class, because projects let their modules hand on the attributes of what is inside.
    return hasattr(module, "peft_config") and hasattr(type(module), "get_base_model")


def _is_lightning_module(module: nn.Module) -> bool:
    """Of either package, ``lightning`` or ``pytorch_lightning``."""
    return hasattr(type(module), "training_step") and hasattr(type(module), "configure_optimizers")


def _has_no_forward(module: nn.Module) -> bool:
    """Whether nothing happens, or nothing but an error, when the module itself is called."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    # Lightning's own forward only raises.
    forward_name = getattr(type(module).forward, "__qualname__", "")
    return _is_lightning_module(module) and forward_name == "LightningModule.forward"


def _trains_lora(network: nn.Module) -> bool:
    return any(
        parameter.requires_grad
        for layer in network.modules()
        if is_lora_layer(layer)
        for name, parameter in layer.named_parameters()
        if "lora_" in name
    )


def _networks(pl_module: nn.Module) -> dict[str, nn.Module]:
    """The networks with LoRA by their qualified names; ``""`` is the LightningModule itself."""
    found: dict[str, nn.Module] = {}
    loose: dict[str, nn.Module] = {}
    for name, module in pl_module.named_modules():
        if any(name == outer or name.startswith(f"{outer}.") for outer in found):
            continue
        if _is_peft_model(module):
            found[name] = module
        elif is_lora_layer(module):
            loose.update([_outermost_network(pl_module, name)])
    inside = {part for network in found.values() for part in network.modules()}
    # The base model of a PeftModel that has an attribute of its own as well.
    loose = {name: network for name, network in loose.items() if network not in inside}
    if len(loose) > 1 and not _has_no_forward(pl_module):
        # Layers of one network that stand directly on the LightningModule, which calls them in its forward.
        loose = {"": pl_module}
    return {**found, **loose}


def _outermost_network(pl_module: nn.Module, layer_name: str) -> tuple[str, nn.Module]:
    """The network that a LoRA layer without a ``PeftModel`` around it belongs to."""
    path = layer_name.split(".")
    names = [".".join(path[:depth]) for depth in range(1, len(path))]
    around = [(name, pl_module.get_submodule(name)) for name in names]
    networks = [(name, m) for name, m in around if not _is_lightning_module(m) and not _has_no_forward(m)]
    hugging_face = [(name, module) for name, module in networks if hasattr(module, "config")]
    return next(iter(hugging_face or networks), ("", pl_module))


def _require_forward(name: str, network: nn.Module) -> None:
    if _has_no_forward(network):
        raise DiscoveryError(
            f"LoRA layers stand directly on {type(network).__name__}{f' ({name})' if name else ''}, which has no "
            "forward to watch; put them into an nn.Module of their own, or define forward and call it in the training "
            "step."
        )


def _hidden_networks(pl_module: nn.Module) -> Iterator[str]:
    """Attributes that hold LoRA layers without registering them as submodules, such as ``models[0]``."""
    registered = set(pl_module.modules())
    for name, module in pl_module.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _BOOKKEEPING and "hooks" not in attribute:
                path = f"{name}.{attribute}" if name else attribute
                for place, inner in _modules_in(value, path, _DEEPEST):
                    if inner not in registered and any(is_lora_layer(part) for part in inner.modules()):
                        yield place


def _modules_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth:
        for place, inner in _contents(value):
            yield from _modules_in(inner, path + place, depth - 1)


def _contents(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", inner) for key, inner in list(value.items())]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [("", inner) for inner in value]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    return [(f".{name}", inner) for name, inner in list(vars(value).items())]
