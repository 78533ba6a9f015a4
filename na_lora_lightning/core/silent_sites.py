"""Refuses gates whose rows are trained without a token of theirs being seen: a fused or patched block hides them.

A gate whose block was skipped (LayerDrop, an early exit, an expert or a part that got no input) is another matter: its
rows have no gradient, so nothing is trained that should be masked, and its averages stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from na_lora_lightning.core.observation.observer import GateObserver
from na_lora_lightning.core.stepping.skipped_steps import GradientWatch
from na_lora_lightning.errors import DiscoveryError


class SilenceCheck:
    """Looks at each site in the first step that trains its rows, and waits for the device in no other.

    Args:
        observer: Says which sites saw tokens.
        gradients: Says which rows are trained.
    """

    def __init__(self, observer: GateObserver, gradients: GradientWatch) -> None:
        self._observer = observer
        self._gradients = gradients
        sites = [] if observer.options.allow_silent_sites else enumerate(observer.sites)
        # No token may be picked for an expert.
        self._unchecked = {
            index: [entry.parameter for entry in site.parameters()] for index, site in sites if site.picked_from is None
        }

    def check(self, tokens: Tensor) -> None:
        """Called in each step, before the gradients are forgotten.

        Args:
            tokens: Tokens seen by each network, ``[networks]``.

        Raises:
            DiscoveryError: Rows of a site have a gradient and it saw no token.
        """
        reached = [i for i, rows in self._unchecked.items() if any(map(self._gradients.is_reached, rows))]
        if not reached:
            return
        silent = self._observer.silent_sites(tokens)
        hidden = [i for i in reached if i in silent and any(map(self._gradients.is_moved, self._unchecked[i]))]
        if hidden:
            names = ", ".join(self._observer.sites[index].name for index in hidden[:4])
            raise DiscoveryError(
                f"the gates {names}{' …' if len(hidden) > 4 else ''} saw no token in the first step that trains their "
                "rows, probably because a fused or patched feed-forward block bypasses the activation module; turn the "
                "patch off, or set allow_silent_sites=True to train those gates unmasked."
            )
        for index in set(reached) - silent:
            del self._unchecked[index]
