"""Options of the step scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

Granularity = Literal["activation", "site", "channel"]


@dataclass(frozen=True)
class StepScaleOptions:
    """Options of the step scale.

    The defaults are what the paper's abstract names, an activation-specific scale, as far as ``docs/evidence.md``,
    section "Defaults", found it to cost nothing at a tuned learning rate. Not normalised, it shortens steps; by channel
    and normalised it moves them from one channel to another. A ``matrix_a_factor`` of 0.25 nearly halves the selection
    misalignment; on two of three screening tasks it cost nothing, in confirmation it did (tables "second round" and
    "confirmation").

    Attributes:
        granularity: One scale per ``"activation"``, per ``"site"`` or per gate ``"channel"``.
        tau: τ, half-width of the homogeneous regime |E−1| ≤ τ, in (0, 1), with the effective homogeneity
            E(z) = z·φ'(z)/φ(z) of the activation φ.
        eta_min: Lowest factor of a regime, in (0, 1]; the step scale is the mean of these factors by share.
        normalize: Divide the scales by their mean over what encloses them (all gate channels of the model for
            activations, the sites of one activation for sites, the channels of one site for channels), so that
            steps are redistributed and not made smaller.
        beta: β of the moving average of the regime shares, in [0, 1).
        matrix_a_factor: Factor on the step of ``lora_A`` of the gate layers, in [0, 1]. A step of B moves each channel
            by its own gradient; a step of A moves the selection of all of them at once. 1 leaves A as the optimizer
            moves it, 0 leaves it as it was drawn. Where gate and up are one layer, they share A.
    """

    granularity: Granularity = "activation"
    tau: float = 0.1
    eta_min: float = 0.1
    normalize: bool = False
    beta: float = 0.9
    matrix_a_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ConfigurationError(
                f"granularity is {self.granularity!r}, which does not exist; choose one of "
                f"{', '.join(get_args(Granularity))}."
            )
        if not 0.0 < self.tau < 1.0:
            raise ConfigurationError(
                f"tau is {self.tau}, and it is the half-width of the homogeneous regime around E = 1; give a number "
                "between 0 and 1, such as 0.1."
            )
        if not 0.0 < self.eta_min <= 1.0:
            raise ConfigurationError(
                f"eta_min is {self.eta_min}, and it is the smallest step scale; give a number above 0 and at most 1."
            )
        if not 0.0 <= self.beta < 1.0:
            raise ConfigurationError(
                f"beta is {self.beta}, and a moving average needs a number from 0 (no memory) to below 1; 0.9 is usual."
            )

        if not 0.0 <= self.matrix_a_factor <= 1.0:
            raise ConfigurationError(
                f"matrix_a_factor is {self.matrix_a_factor}, and it is the part of the step of lora_A that is taken; "
                "give a number from 0 to 1 (1 takes all of it)."
            )

    def check(self, sites: Sequence[GateSite]) -> None:
        """See :meth:`check_activations`."""
        self.check_activations(sites)

    def check_activations(self, sites: Sequence[GateSite]) -> None:
        """Checks that the scale can differ from 1 anywhere, or that there is a step of A to shorten.

        Raises:
            ConfigurationError: It is exactly 1 by construction, so that training would be vanilla LoRA.
        """
        if self.matrix_a_factor != 1.0 and any(site.matrices_a() for site in sites):
            return
        names = {site.activation.name for site in sites if has_partition(site)}
        if not names:
            raise ConfigurationError(
                f"the step scale is exactly 1 for {', '.join(sorted({s.activation.name for s in sites}))}, whose "
                "effective homogeneity has no meaningful partition; leave StepScaleCallback out (--step_scale false)."
            )
        if self.normalize and self.granularity == "activation" and len(names) == 1:
            raise ConfigurationError(
                f"normalize with granularity 'activation' makes the step scale exactly 1, because {names.pop()} is the "
                "only activation; use granularity 'site' or 'channel', or normalize=False."
            )

    @property
    def is_neutral(self) -> bool:
        """Whether every step stays what it is by what is asked for."""
        return self.eta_min == 1.0 and self.matrix_a_factor == 1.0

    def cancels_out(self, sites: Sequence[GateSite]) -> bool:
        """Whether normalisation by site makes every scale 1, because each activation has one gate alone."""
        networks = Counter(site.activation.name for site in sites if has_partition(site) for _ in range(site.networks))
        return self.normalize and self.granularity == "site" and max(networks.values(), default=1) == 1


def has_partition(site: GateSite) -> bool:
    """Whether the site's activation is self-gated with an E that varies on its support."""
    return site.activation.self_gated and not site.activation.has_constant_homogeneity
