"""Whether the rows of a site are the right ones: each is moved and the model is watched.

Nothing here uses the reasoning of the discovery. A row of ``lora_B`` (for stacked experts the columns of one expert
in it) is moved, and exactly one channel of the pre-activation may change. Which rows of a pre-activation belong to an
expert is found by moving the expert's own matrix. Where no activation module shows the pre-activation, the gated
result is looked at as well: it changes in the same channel, and follows the activation and not a straight line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zoo.watching import Seen, changed_rows, look, moved_row, rows_of_experts

from na_lora_lightning.core.pre_activations import ActivationInput
from na_lora_lightning.core.sites import GateSite

MOVES = (1.0, -1.0, 4.0, -4.0)
UNCHANGED = 1e-3


def row_problems(root: nn.Module, inputs: Mapping[str, Any], site: GateSite) -> list[str]:
    """What is wrong with the rows of a site, in words; nothing where they are right.

    Args:
        root: The base model inside the PEFT model.
        inputs: Arguments of its forward.
        site: The site.
    """
    before = look(root, inputs, site)
    if not before.pre_activations:
        return [f"{site.name} never fired"]
    widths = {z.shape[-1] for z in before.pre_activations}
    if widths != {site.channels}:
        return [f"{site.name} has {site.channels} channels and its pre-activation {sorted(widths)}"]
    problem = _wrong_activation(site, before)
    if problem is None and site.experts is None:
        with moved_row(site, 0, None, 1.0):
            problem = _wrong_kind(site, before, look(root, inputs, site))
    if problem is not None:
        return [f"{site.name} {problem}"]
    return _Rows(root, inputs, site, before).problems()


def _wrong_activation(site: GateSite, before: Seen) -> str | None:
    """Whether the module gives what the site's activation says."""
    for z, activated in zip(before.pre_activations, before.activated, strict=False):
        told = site.activation.evaluate(z.float()).output
        if not torch.allclose(told, activated.float(), rtol=1e-3, atol=1e-4):
            return f"does not compute {site.activation.name}"
    return None


def _wrong_kind(site: GateSite, before: Seen, after: Seen) -> str | None:
    """Whether the gated result is the activation's output alone; ``after`` the row of channel 0 was moved."""
    call = first_change(before.results, after.results)
    if call is None or len(before.results) != len(before.pre_activations):
        return None
    z, result = before.pre_activations[call].double(), before.results[call].double()
    mixed = only_channel((after.results[call] - before.results[call]).abs(), 0, exact=True) is not None
    # A normalisation between the two hides what is looked for.
    if z.shape != result.shape or mixed:
        return None
    told = site.activation.evaluate(z).output
    factor = (told * result).sum() / told.square().sum()
    alone = bool((result - factor * told).norm() < 1e-3 * result.norm())
    return None if alone == (site.kind == "plain") else f"is not {site.kind}"


class _Rows:
    """The rows of one site."""

    def __init__(self, root: nn.Module, inputs: Mapping[str, Any], site: GateSite, before: Seen) -> None:
        self._root = root
        self._inputs = inputs
        self._site = site
        self._before = before
        self._experts = [] if site.experts is None else rows_of_experts(root, inputs, site, before)

    def problems(self) -> list[str]:
        """The first problem of the site, or of each expert that some token goes to."""
        if self._site.experts is None:
            return self._network(None)
        used = [expert for expert, rows in enumerate(self._experts) if rows.any()]
        if not used:
            return [f"no expert of {self._site.name} makes a row of its pre-activation"]
        return [problem for expert in used for problem in self._network(expert)]

    def _network(self, expert: int | None) -> list[str]:
        for channel in range(self._site.channels):
            problem = self._channel(expert, channel)
            if problem is not None:
                where = f"{self._site.name} channel {channel}" + ("" if expert is None else f" expert {expert}")
                return [f"{where}: {problem}"]
        return []

    def _channel(self, expert: int | None, channel: int) -> str | None:
        after = self._after(expert, channel, 1.0)
        call = first_change(self._before.pre_activations, after.pre_activations)
        if call is None:
            return f"moving row {int(self._site.rows[channel])} of lora_B changes nothing"
        change = (after.pre_activations[call] - self._before.pre_activations[call]).abs()
        problem = only_channel(change, channel, exact=self._site.found_by != "position")
        if problem is None and expert is not None:
            problem = self._other_rows(after, expert)
        if problem is not None:
            return f"in the pre-activation {problem}"
        return None if isinstance(self._site.source, ActivationInput) else self._result(expert, channel, after)

    def _other_rows(self, after: Seen, expert: int) -> str | None:
        own, changed = self._experts[expert], changed_rows(self._before, after)
        if torch.equal(own, changed):
            return None
        return f"{int(changed.sum())} rows change, and the matrix of the expert makes other {int(own.sum())}"

    def _result(self, expert: int | None, channel: int, after: Seen) -> str | None:
        """What the gated result says where no module shows the activation."""
        call = first_change(self._before.results, after.results)
        if call is None:
            # No token may be where a ReLU responds.
            after = self._after(expert, channel, -1.0)
            call = first_change(self._before.results, after.results)
        if call is None:
            return "the gated result does not change"
        change = (after.results[call] - self._before.results[call]).abs()
        problem = only_channel(change, channel, exact=True)
        if problem is not None:
            return f"in the gated result {problem}"
        return self._response(expert, channel, call) if channel < 2 else None

    def _response(self, expert: int | None, channel: int, call: int) -> str | None:
        """Whether the gated result follows the activation while its pre-activation moves."""
        runs = [self._before, *(self._after(expert, channel, size) for size in MOVES)]
        results = torch.stack([run.results[call][:, channel] for run in runs]).double()
        z = torch.stack([run.pre_activations[call][:, channel] for run in runs])
        told = self._site.activation.evaluate(z).output.double()
        results, told = results[1:] - results[0], told[1:] - told[0]
        size = results.abs().amax()
        bent = (results[0] + results[1]).abs().amax() + (results[2] + results[3]).abs().amax()
        if bool(bent < 1e-3 * size):
            return "the gated result is linear in it, so it is no gate"
        other = (results * told).sum(0) / told.square().sum(0).clamp(min=1e-12)
        if bool((results - other * told).abs().amax() > 1e-2 * size):
            return f"the gated result does not follow {self._site.activation.name}"
        return None

    def _after(self, expert: int | None, channel: int, size: float) -> Seen:
        with moved_row(self._site, channel, expert, size):
            return look(self._root, self._inputs, self._site)


def first_change(before: list[Tensor], after: list[Tensor]) -> int | None:
    """The first call whose values differ."""
    for call, (one, other) in enumerate(zip(before, after, strict=True)):
        if not torch.equal(one, other):
            return call
    return None


def only_channel(change: Tensor, channel: int, exact: bool) -> str | None:
    """Whether a change ``[tokens, channels]`` is one of this channel; else what it is instead."""
    by_channel = change.amax(dim=0)
    most = int(by_channel.argmax())
    if most != channel:
        return f"channel {most} changes instead"
    others = by_channel.clone()
    others[channel] = 0.0
    if exact and bool(others.max() > UNCHANGED * by_channel[channel]):
        return f"channel {int(others.argmax())} changes too"
    return None
