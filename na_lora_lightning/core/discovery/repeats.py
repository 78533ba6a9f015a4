"""Gates that share a module, and gates that several modules compute alike."""

from __future__ import annotations

import torch

from na_lora_lightning.core.discovery.blocks import same_tensor
from na_lora_lightning.core.discovery.trace import ActivationCall
from na_lora_lightning.core.sites import GateSite, LeftOut
from na_lora_lightning.errors import DiscoveryError

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
