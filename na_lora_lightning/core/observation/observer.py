"""Gate statistics of an optimizer step, from one observer shared by all mechanisms.

The observer hooks the activation modules. In each training forward pass it takes rows of their inputs, evaluates them
for many sites at once, and adds, per gate channel, sums over the real tokens to a buffer that is laid out flat over
all sites; micro-batches accumulate, and processes add their buffers, so that a mean over them is the mean over all
tokens of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.compilation import outside_of_graphs, single_precision
from na_lora_lightning.core.experts import RoutedCall, routed_call
from na_lora_lightning.core.observation.passes import ForwardPasses
from na_lora_lightning.core.observation.routed_rows import look_at
from na_lora_lightning.core.observation.taken_rows import Batch, RowsOfSite, TakenRows
from na_lora_lightning.core.observation.tokens import TokenSelection
from na_lora_lightning.core.pre_activations import Handle
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

Listener = Callable[[int, GateSite, Tensor, Tensor], None]


@dataclass(frozen=True)
class ObserverOptions:
    """What the observer looks at.

    Attributes:
        max_tokens: Tokens looked at per site and forward pass at most, evenly spread and shifted from pass to
            pass; None looks at all. A bound on the cost.
        exclude_prompt: Leave out positions that predict no target, which needs labels in the forward call.
        allow_silent_sites: Go on when a site does not fire in the first step that trains its rows (a fused or
            replaced feed-forward block), leaving them unmasked.
    """

    max_tokens: int | None = 128
    exclude_prompt: bool = False
    allow_silent_sites: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigurationError(
                f"max_tokens is {self.max_tokens}, and no statistics come from fewer than one token; give a positive "
                "number, or null for all tokens."
            )


class Collector(Protocol):
    """What a mechanism wants to have summed over tokens.

    Attributes:
        components: Number of values per column.
    """

    components: int

    def columns(self, site: GateSite) -> int:
        """Columns that each network of a site takes: its channels, or 1 for sums over them."""

    def collect(self, values: ActivationValues, token_weight: Tensor) -> Tensor:
        """Sums over tokens, ``[components, sites·networks·columns]``.

        Args:
            values: Activation values at ``[sites, tokens, channels]``, float32.
            token_weight: ``[sites, networks, tokens]``, how many tokens each stands for in a network, or 0.
        """


@dataclass
class StepStatistics:
    """Sums of one optimizer step over all its tokens.

    Attributes:
        sums: ``[components, total columns]`` float32.
        tokens: Number of tokens seen by each network, ``[networks]`` float32.
    """

    sums: Tensor
    tokens: Tensor


class GateObserver(ForwardPasses):
    """Hooks on the model that sum gate statistics over the tokens of an optimizer step.

    Args:
        root: The model whose call carries the padding mask.
        sites: Gate sites inside it.
        options: What to look at.
        entrance: The module around it whose hooks see the call, where its own do not.

    Attributes:
        nonfinite: Which networks had a sum that was not finite since this was last cleared, ``[networks]`` boolean.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: Sequence[GateSite],
        options: ObserverOptions,
        entrance: nn.Module | None = None,
    ) -> None:
        super().__init__(root, sites, options.max_tokens, options.exclude_prompt, entrance)
        self.sites = list(sites)
        self.options = options
        self.nonfinite: Tensor | None = None
        self._collectors: dict[str, Collector] = {}
        self._is_due: dict[str, Callable[[], bool]] = {}
        self._layouts: dict[str, Layout] = {}
        # Everything that is summed up, and parts of it by collector.
        self._buffer: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
        self._zero = torch.zeros((), device=self.device)
        self._taken = TakenRows()
        self._calls: dict[int, int] = {}
        self._routed: dict[nn.Module, RoutedCall] = {}
        self._networks_of_site = Layout([(site.networks, 1) for site in sites], torch.device("cpu")).site_slices
        self._handles: list[Handle | torch.utils.hooks.RemovableHandle] = []
        self._listeners: list[Listener] = []

    @property
    def device(self) -> torch.device:
        """Where the sums are kept: with the LoRA rows of the first site."""
        return self.sites[0].parameters()[0].parameter.device

    def add(self, name: str, collector: Collector, is_due: Callable[[], bool] | None = None) -> Layout:
        """Registers a collector and returns the layout of its sums.

        Args:
            name: Of the collector.
            collector: What is to be summed.
            is_due: Whether it is in the step under way, alike in all processes; None for every step.

        Returns:
            The layout.
        """
        if is_due is not None:
            self._is_due[name] = is_due
        layout = Layout([(site.networks, collector.columns(site)) for site in self.sites], self.device)
        self._collectors[name] = collector
        self._layouts[name] = layout
        return layout

    def listen(self, listener: Listener) -> None:
        """Calls ``listener(site index, site, z, token weight)`` in each recorded pass, with z in the model's dtype.

        Sites of stacked experts are not listened to.
        """
        self._listeners.append(listener)

    def attach(self) -> None:
        """Registers the hooks."""
        shapes = [(each.components, self._layouts[name].total) for name, each in self._collectors.items()]
        sizes = [self._networks_of_site[-1].stop, *map(math.prod, shapes)]
        self._buffer = torch.zeros(sum(sizes), device=self.device)
        self._tokens, *sums = self._buffer.split(sizes)
        self._sums = {name: s.view(shape) for name, s, shape in zip(self._collectors, sums, shapes, strict=True)}
        self._handles += self.hook()
        begin_experts = outside_of_graphs(self._begin_experts)
        for owner in dict.fromkeys(site.experts.owner for site in self.sites if site.experts is not None):
            self._handles.append(owner.register_forward_pre_hook(begin_experts, with_kwargs=True))
        watched: dict[tuple[type, nn.Module], list[int]] = {}
        for index, site in enumerate(self.sites):
            # Sites that share an activation module count its calls together; other sources are a site's own.
            watched.setdefault((type(site.source), site.source.module), []).append(index)
        for here in watched.values():
            self._handles.append(self.sites[here[0]].source.watch(self._make_watcher(here)))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget_pass()
        self._routed.clear()

    @property
    def buffers(self) -> list[Tensor]:
        """What was summed up since the last step, the sums themselves."""
        self._evaluate(self._taken.take_all())
        return [] if self._buffer is None else [self._buffer]

    def reset(self) -> None:
        """Forgets what was seen since the last step."""
        self._taken.clear()
        if self._buffer is not None:
            self._buffer.zero_()

    def finish_step(self, reduce: Callable[[Tensor], None] | None) -> dict[str, StepStatistics]:
        """Hands over the sums of the step and starts the next.

        Args:
            reduce: Adds a tensor over all processes in place, or None for one process.

        Returns:
            A copy of the sums for each collector that is due. A network of which one is NaN or infinite counts as if it
            had seen no token, so that moving averages stay finite, and is marked in ``nonfinite``.
        """
        assert self._buffer is not None, "attach() comes first"
        assert self._tokens is not None
        self._evaluate(self._taken.take_all())
        if reduce is not None:
            reduce(self._buffer)
        due = {name: self._sums[name] for name in self._due()}
        # What is not finite makes the sum over its network so.
        totals = [self._layouts[name].over_networks(each, lambda x: x.sum(dim=(0, -1))) for name, each in due.items()]
        total = sum(totals, self._tokens)
        broken = total - total != 0
        self.nonfinite = broken if self.nonfinite is None else self.nonfinite.logical_or_(broken)
        tokens = torch.where(broken, self._zero, self._tokens)
        # Columns are channels or networks, so that as many are the same ones.
        layouts = {self._layouts[name].total: self._layouts[name] for name in due}
        by_column = {columns: layout.spread(broken) for columns, layout in layouts.items()}
        statistics = {
            name: StepStatistics(torch.where(by_column[self._layouts[name].total], self._zero, sums), tokens)
            for name, sums in due.items()
        }
        self.reset()
        return statistics

    def take_nonfinite(self) -> list[str]:
        """Names of the sites in ``nonfinite``, which is cleared; synchronises, so for logging steps."""
        if self.nonfinite is None:
            return []
        broken, self.nonfinite = self.nonfinite.tolist(), None
        return [site.name for site, own in zip(self.sites, self._networks_of_site, strict=True) if any(broken[own])]

    def silent_sites(self, tokens: Tensor) -> set[int]:
        """Sites that saw no token in a step, by what :meth:`finish_step` says of it; synchronises."""
        # What was left out for values that are not finite was seen.
        seen = (tokens if self.nonfinite is None else tokens + self.nonfinite).tolist()
        return {index for index, own in enumerate(self._networks_of_site) if not any(seen[own])}

    def _pass_begins(self) -> None:
        self._calls.clear()

    def _pass_ends(self) -> None:
        self._evaluate(self._taken.take_all())

    def _begin_experts(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.selection is not None:
            self._routed[owner] = routed_call(args, kwargs)

    def _make_watcher(self, here: list[int]) -> Callable[[Tensor], None]:
        key = here[0]

        def watcher(pre_activation: Tensor) -> None:
            # None outside of a recorded pass: a checkpointed block that is run again in the backward pass, say.
            if self.selection is None and not any(index in self._alone for index in here):
                return
            call = self._calls.get(key, 0)
            self._calls[key] = call + 1
            with torch.no_grad(), single_precision(pre_activation.device):
                for index in here:
                    site = self.sites[index]
                    selection = self.selection_of(index)
                    if selection is not None and (site.calls is None or call in site.calls):
                        self._record(index, selection, pre_activation)

        return watcher

    def _record(self, index: int, selection: TokenSelection, pre_activation: Tensor) -> None:
        site = self.sites[index]
        if site.experts is None:
            rows = selection.rows(pre_activation, site.name, site.time_first)
            weight = selection.weights(pre_activation)[None]
        else:
            routed = self._routed[site.experts.owner]
            rows, weight = look_at(site.experts, routed, selection, pre_activation, site.name)
            routed.activations += 1
        self._evaluate(self._taken.add(RowsOfSite(index, site.activation, rows, weight), pre_activation))
        if self.selection is None:
            # No end of a pass comes after a layer that is called by itself.
            self._pass_ends()
        if site.experts is None:
            for listener in self._listeners:
                listener(index, site, rows, weight[0])

    @torch.no_grad()
    def _evaluate(self, batches: Iterable[Batch]) -> None:
        assert self._tokens is not None
        for batch in batches:
            with single_precision(batch.rows.device):
                values = batch.activation.evaluate(batch.rows)
                batch.add_to(self._tokens[None], self._networks_of_site, batch.weight.sum(dim=-1).reshape(1, -1))
                for name in self._due():
                    collected = self._collectors[name].collect(values, batch.weight)
                    batch.add_to(self._sums[name], self._layouts[name].site_slices, collected)

    def _due(self) -> list[str]:
        return [name for name in self._collectors if name not in self._is_due or self._is_due[name]()]
