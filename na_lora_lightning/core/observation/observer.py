"""Gate statistics of an optimizer step, from one observer shared by all mechanisms.

The observer hooks the activation modules. In each training forward pass it adds, per gate channel, sums over the
real tokens to a buffer that is laid out flat over all sites; micro-batches accumulate, and processes add their
buffers, so that a mean over them is the mean over all tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.compilation import outside_of_graphs
from na_lora_lightning.core.experts import RoutedCall, routed_call
from na_lora_lightning.core.layout import Layout
from na_lora_lightning.core.observation.passes import ForwardPasses
from na_lora_lightning.core.observation.routed_rows import look_at
from na_lora_lightning.core.observation.tokens import TokenSelection
from na_lora_lightning.core.pre_activations import Handle
from na_lora_lightning.core.precision import single_precision
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

_CPU_CHUNK_ELEMENTS = 64 * 1536

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
        """Sums over tokens, ``[components, networks·columns]``.

        Args:
            values: Activation values at ``[tokens, channels]``, float32.
            token_weight: ``[networks, tokens]``, how many tokens each stands for in a network, or 0.
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
        self._sums: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
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
        self._sums[name] = torch.zeros(collector.components, layout.total, device=self.device)
        return layout

    def listen(self, listener: Listener) -> None:
        """Calls ``listener(site index, site, z, token weight)`` in each recorded pass, after z was summed up.

        Sites of stacked experts are not listened to.
        """
        self._listeners.append(listener)

    def attach(self) -> None:
        """Registers the hooks."""
        self._tokens = torch.zeros(sum(site.networks for site in self.sites), device=self.device)
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
        return [*self._sums.values(), *([] if self._tokens is None else [self._tokens])]

    def reset(self) -> None:
        """Forgets what was seen since the last step."""
        for sums in self._sums.values():
            sums.zero_()
        if self._tokens is not None:
            self._tokens.zero_()

    def finish_step(self, reduce: Callable[[Tensor], None] | None) -> dict[str, StepStatistics]:
        """Hands over the sums of the step and starts the next.

        Args:
            reduce: Adds a tensor over all processes in place, or None for one process.

        Returns:
            A copy of the sums for each collector that is due. A network of which one is NaN or infinite counts as if it
            had seen no token, so that moving averages stay finite, and is marked in ``nonfinite``.
        """
        assert self._tokens is not None, "attach() comes first"
        due = {name: self._sums[name] for name in self._due()}
        if reduce is not None:
            reduce(self._tokens)
            for sums in due.values():
                reduce(sums)
        broken = torch.zeros_like(self._tokens)
        for name, sums in due.items():
            columns = (~sums.isfinite()).any(dim=0).to(broken)
            broken.index_add_(0, self._layouts[name].network_of_column, columns)
        usable = broken == 0
        self.nonfinite = ~usable if self.nonfinite is None else self.nonfinite | ~usable
        tokens = torch.where(usable, self._tokens, 0.0)
        statistics = {
            name: StepStatistics(torch.where(self._layouts[name].spread(usable), sums, 0.0), tokens)
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
        assert self._tokens is not None
        site = self.sites[index]
        if site.experts is None:
            looked_at = selection.rows(pre_activation, site.name, site.time_first).float()
            weight = selection.weights(pre_activation)[None]
        else:
            routed = self._routed[site.experts.owner]
            rows, weight = look_at(site.experts, routed, selection, pre_activation, site.name)
            looked_at = rows.float()
            routed.activations += 1
        chunk, due = self._tokens_per_chunk(looked_at), self._due()
        for some, some_weight in zip(looked_at.split(chunk), weight.split(chunk, dim=1), strict=True):
            values = site.activation.evaluate(some)
            for name in due:
                collected = self._collectors[name].collect(values, some_weight)
                columns = self._layouts[name].site_slices[index]
                self._sums[name][:, columns] += collected.to(self._sums[name].device)
        self._tokens[self._networks_of_site[index]] += weight.sum(dim=1).to(self._tokens.device)
        if site.experts is None:
            for listener in self._listeners:
                listener(index, site, looked_at, weight[0])

    def _due(self) -> list[str]:
        return [name for name in self._collectors if name not in self._is_due or self._is_due[name]()]

    @staticmethod
    def _tokens_per_chunk(looked_at: Tensor) -> int:
        """Tokens evaluated at once: on a CPU few enough that intermediate values stay in its cache."""
        tokens, channels = looked_at.shape
        return max(1, _CPU_CHUNK_ELEMENTS // channels) if looked_at.device.type == "cpu" else max(1, tokens)
