"""The history of a training without Lightning: gates, and whatever else was measured, in ``history.jsonl``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.in_force import describe
from na_lora_lightning.core.mechanisms.metrics import GateMetrics
from na_lora_lightning.errors import ViewWarning
from na_lora_lightning.history import HistoryWriter


def describe_gates(controller: GateController) -> dict[str, Any]:
    """What is in force, the options of the mechanisms, and the gate sites, as plain values."""
    gates = controller.gates
    return {
        "in_force": describe(gates, controller.mechanisms),
        "mechanisms": {each.name: asdict(each.options) for each in controller.mechanisms},
        "sites": [
            {
                "label": label,
                "name": site.name,
                "layer": site.layer,
                "part": site.part,
                "activation": site.activation.name,
                "kind": site.kind,
                "channels": site.channels * site.networks,
            }
            for label, site in zip(gates.labels, gates.sites, strict=True)
        ],
    }


def worth_keeping(found: GateMetrics) -> dict[str, list[float]]:
    """Values by site of what is no constant; the density, which says when a mask set in, is kept."""
    dropped = found.constant - {"gate_mask_density"}
    return {group: list(values) for group, values in found.sites.items() if group not in dropped}


class GateHistory:
    """Writes the history of one training; what cannot be written is said once, and training goes on.

    Args:
        folder: Of the run.
        controller: Its hooks are on.
        options: Hyper-parameters by name, for the report.
    """

    def __init__(
        self, folder: str | os.PathLike[str], controller: GateController, options: Mapping[str, Any] | None = None
    ) -> None:
        self._writer: HistoryWriter | None = HistoryWriter(folder)
        self._controller = controller
        self._options = dict(options or {})
        self._started = False

    def start(self, step: int, planned_steps: int | None = None) -> None:
        """Begins, or goes on after ``step`` optimizer steps; once."""
        if self._started:
            return
        self._started = True
        described = describe_gates(self._controller)
        options = dict(self._options)
        for kind, own in described["mechanisms"].items():
            options |= {f"gates.{kind}.{name}": value for name, value in own.items() if value is not None}
        self._write("start", step, version=1, planned_steps=planned_steps, options=options, **described)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the gates as they were in the last step, with metrics of training."""
        gates = worth_keeping(self._controller.gate_metrics())
        self._write("step", step, gates=gates, metrics=dict(metrics))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes what validation measured."""
        self._write("validation", step, metrics=dict(metrics))

    def end(self, step: int, outcome: str = "ended") -> None:
        """Says how training ended."""
        if self._started:
            self._write("end", step, outcome=outcome)

    def _write(self, kind: str, step: int, **content: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(kind, step, **content)
        except OSError as error:
            path, self._writer = self._writer.path, None
            warnings.warn(
                f"the history cannot be written to {str(path)!r} ({error.strerror}), and training goes on without.",
                ViewWarning,
                stacklevel=2,
            )
