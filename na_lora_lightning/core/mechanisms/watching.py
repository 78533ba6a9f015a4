"""What the step scale would be where rows are only watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import GateObserver, StepStatistics
from na_lora_lightning.core.sites import GateSite

_NAME = "watched"


class Watching:
    """Shows the step scale of channels by each measured step alone, and corrects nothing.

    Args:
        observer: Of the model.
        sites: Gate sites.
        layout: Layout of their channels.
        is_due: Whether the coming step is measured.

    Attributes:
        scale: By the last step; None where that was not measured.
    """

    def __init__(
        self, observer: GateObserver, sites: Sequence[GateSite], layout: Layout, is_due: Callable[[], bool]
    ) -> None:
        self.scale: StepScale | None = None
        self._options = StepScaleOptions(granularity="channel", normalize=True, beta=0.0)
        self._sites = sites
        self._layout = layout
        observer.add(_NAME, StepScale.collector(self._options), is_due=is_due)

    def update(self, statistics: Mapping[str, StepStatistics]) -> None:
        """Takes in one optimizer step."""
        self.scale = None
        if _NAME in statistics:
            self.scale = StepScale(self._options, self._sites, self._layout)
            self.scale.update(statistics[_NAME])
