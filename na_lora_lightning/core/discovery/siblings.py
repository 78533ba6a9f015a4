"""Gates that are told by another: of blocks that a probe did not enter, of shared modules, and repeated ones.

A router sends a probe's few tokens to some of many experts. The experts stand beside each other in a list or a
dictionary, and differ in their weights alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from na_lora_lightning.core.discovery.blocks import same_tensor
from na_lora_lightning.core.discovery.trace import ActivationCall
from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer
from na_lora_lightning.core.model_parts import branch_name, half_of, language_model_name
from na_lora_lightning.core.pre_activations import ActivationInput, ActivationInputs, LayerOutput
from na_lora_lightning.core.sites import GateSite, LeftOut
from na_lora_lightning.errors import DiscoveryError


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


Result = tuple[int, GateSite] | LeftOut


def share_module(found: list[tuple[int, GateSite]], exclusive: bool) -> list[GateSite]:
    """Sites of one activation module, by its calls: one site for each LoRA layer that it follows."""
    shared: dict[int, GateSite] = {}
    for index, site in found:
        known = shared.setdefault(id(site.lora_layer), site)
        if not torch.equal(known.rows, site.rows):
            raise DiscoveryError(
                f"the gate {site.name!r} uses different rows of {site.lora_layer_name!r} in different calls; "
                "exclude this layer from the LoRA targets."
            )
        known.calls = frozenset({index}) | (known.calls or frozenset())
    if exclusive and len({site.calls for site in shared.values()}) == 1:
        # They follow the same calls, and these are all that there are.
        for site in shared.values():
            site.calls = None
    return list(shared.values())


class Repeats:
    """Tells gates that another module has computed before, such as of an embedding of time in each block.

    Were each a site, the rows would be held and scaled once for each.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, GateSite]] = []

    def left_out(self, results: list[tuple[ActivationCall, Result]]) -> list[tuple[ActivationCall, Result]]:
        """The results of one module, where all of its sites are repeats with what they repeat in their place."""
        sites = [(call, result[1]) for call, result in results if isinstance(result, tuple)]
        firsts = [self._first(call, site) for call, site in sites]
        self._seen += [(call.pre_activation, site) for call, site in sites]
        if not sites or any(first is None for first in firsts):
            return results
        names = dict.fromkeys(first.name for first in firsts if first is not None)
        call, site = sites[0]
        reason = f"it repeats {', '.join(names)}, which stands for both"
        return [(call, LeftOut(call.name, site.activation.name, reason))]

    def _first(self, call: ActivationCall, site: GateSite) -> GateSite | None:
        return next((known for z, known in self._seen if _is_same(call.pre_activation, site, z, known)), None)


def _is_same(z: torch.Tensor, site: GateSite, other_z: torch.Tensor, other: GateSite) -> bool:
    return (
        site.lora_layer is other.lora_layer
        and site.activation.name == other.activation.name
        and same_tensor(z, other_z)
        and torch.equal(site.rows, other.rows)
    )


def one_site_for_rows(sites: Iterable[GateSite], root: nn.Module) -> tuple[list[GateSite], list[LeftOut]]:
    """One site for rows that make several gates, of all that they make; or none, with the reason.

    Args:
        sites: Sites that were found.
        root: The model.

    Returns:
        Sites without a row in common, and the gates that cannot be put together.
    """
    by_layer: dict[nn.Module, list[GateSite]] = defaultdict(list)
    for site in sites:
        by_layer[site.lora_layer].append(site)
    kept: list[GateSite] = []
    left_out: list[LeftOut] = []
    for found in by_layer.values():
        while found:
            first = found.pop(0)
            shared = [site for site in found if set(site.rows.tolist()) & set(first.rows.tolist())]
            found = [site for site in found if site not in shared]
            together = _together([first, *shared], root)
            if together is not None:
                kept.append(together)
                continue
            for site in (first, *shared):
                others = ", ".join(dict.fromkeys(other.name for other in (first, *shared) if other is not site))
                reason = f"the rows of {site.lora_layer_name} that make it make {others} too, and serve one gate alone"
                left_out.append(LeftOut(site.name, site.activation.name, reason, not_supported=True))
    return kept, left_out


def _together(sites: list[GateSite], root: nn.Module) -> GateSite | None:
    first = sites[0]
    if len(sites) == 1:
        return first
    if not all(site.activation.name == first.activation.name and torch.equal(site.rows, first.rows) for site in sites):
        return None
    kinds = {type(site.source) for site in sites}
    if kinds == {LayerOutput} and len({_clamp(site) for site in sites}) == 1:
        # It sees all calls of the layer.
        return first
    modules = dict.fromkeys(site.source.module for site in sites)
    if kinds != {ActivationInput} or len(modules) < len(sites) or any(site.calls is not None for site in sites):
        return None
    if len({_part(root, site.name) for site in sites}) > 1:
        return None
    return replace(first, source=ActivationInputs(first.source.module, tuple(modules)[1:]))


def _clamp(site: GateSite) -> tuple[float | None, float | None]:
    assert isinstance(site.source, LayerOutput)
    return site.source.channels.lowest, site.source.channels.highest


def _part(root: nn.Module, name: str) -> tuple[object, object]:
    """What has tokens of its own."""
    return branch_name(root, language_model_name(root), name), half_of(root, name)
