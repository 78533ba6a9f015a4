"""Gates of blocks that a probe did not enter, told by a sibling of the same structure that it did.

A router sends a probe's few tokens to some of many experts. The experts stand beside each other in a list or a
dictionary, and differ in their weights alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer
from na_lora_lightning.core.sites import GateSite


def sites_of_siblings(root: nn.Module, sites: Collection[GateSite], called: Collection[nn.Module]) -> list[GateSite]:
    """Sites in blocks that were not called, each like one in a block that was.

    Args:
        root: The model.
        sites: Sites that were found.
        called: Linear layers that were called.

    Returns:
        Further sites; none where blocks differ in structure or settings, or share the activation module.
    """
    modules = dict(root.named_modules())
    waiting = {name for name, module in modules.items() if is_lora_layer(module) and module not in called}
    pending = [site for site in sites if site.experts is None and site.calls is None]
    further: list[GateSite] = []
    while pending and waiting:
        site = pending.pop()
        for block, twin in _twins(modules, site.lora_layer_name):
            if twin + site.lora_layer_name.removeprefix(block) not in waiting:
                continue
            copy = _moved(modules, site, block, twin)
            one, other = modules[block], modules[twin]
            if copy is not None and not _layers(other) & set(called) and _alike(one, other):
                waiting.remove(copy.lora_layer_name)
                further.append(copy)
                pending.append(copy)
    return further


def _twins(modules: Mapping[str, nn.Module], name: str) -> Iterator[tuple[str, str]]:
    """Names of the blocks around a module that stand in a list or a dictionary, and of each other one there."""
    path = name.split(".")
    for depth in range(len(path) - 1):
        container = modules[".".join(path[:depth])]
        if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            start = "".join(f"{part}." for part in path[:depth])
            others = (child for child, _ in container.named_children() if child != path[depth])
            yield from ((start + path[depth], start + child) for child in others)


def _moved(modules: Mapping[str, nn.Module], site: GateSite, block: str, twin: str) -> GateSite | None:
    """The same site in another block; None where part of it is outside of the block."""
    watched = next(name for name, module in modules.items() if module is site.source.module)
    inside = (site.lora_layer_name, site.output_layer_name or "", watched)
    others = [twin + name.removeprefix(block) for name in inside]
    if not all(name.startswith(f"{block}.") for name in inside) or not all(name in modules for name in others):
        return None
    within = site.name.startswith(block)
    return replace(
        site,
        name=twin + site.name.removeprefix(block) if within else f"{others[0]}.{site.activation.name}",
        lora_layer_name=others[0],
        lora_layer=modules[others[0]],
        output_layer_name=others[1],
        output_layer=modules[others[1]],
        source=replace(site.source, module=modules[others[2]]),
    )


def _layers(block: nn.Module) -> set[nn.Module]:
    return {module for module in block.modules() if is_linear(module) or is_lora_layer(module)}


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks differ in nothing but their weights, and numbers such as that of a layer."""
    if type(one) is not type(other) or repr(one) != repr(other):
        return False
    return all(_settings(a) == _settings(b) for a, b in zip(one.modules(), other.modules(), strict=True))


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (isinstance(value, (float, bool, str, type(None))) or callable(value))
    }
