"""Rows that wait are evaluated as if each site were alone, in bounded memory; a site adds one operation to a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from na_lora_lightning import ImportanceOptions, ObserverOptions, StepScaleOptions, nonlinearity_aware
from na_lora_lightning.core.activations import GELU, SILU, Activation
from na_lora_lightning.core.mechanisms.importance import ResponsivenessCollector
from na_lora_lightning.core.mechanisms.step_scale import RegimeCollector
from na_lora_lightning.core.observation import taken_rows
from na_lora_lightning.core.observation.taken_rows import Batch, RowsOfSite, TakenRows

MASK = ImportanceOptions(warmup_steps=0)


def limited_to(elements: int) -> Any:
    return patch.object(taken_rows, "_MOST_ELEMENTS_ON_CPU", elements)


@st.composite
def taken(draw: st.DrawFn) -> list[RowsOfSite]:
    """Rows of sites in a row, some of which share an activation, a shape or their weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shared = {(n, t): torch.rand(n, t, generator=generator).round() for n in (1, 2) for t in range(5)}
    found = []
    for index in range(draw(st.integers(1, 7))):
        networks, tokens, channels = draw(st.integers(1, 2)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
        activation: Activation = draw(st.sampled_from([SILU, GELU]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        own = torch.rand(networks, tokens, generator=generator)
        weight = shared[networks, tokens] if draw(st.booleans()) else own
        found.append(
            RowsOfSite(index, activation, (3 * torch.randn(tokens, channels, generator=generator)).to(dtype), weight)
        )
    return found


@given(sites=taken(), most=st.integers(1, 30))
def test_sums_do_not_depend_on_what_is_evaluated_at_once(sites: list[RowsOfSite], most: int) -> None:
    ends = torch.tensor([each.rows.shape[1] * len(each.weight) for each in sites]).cumsum(0).tolist()
    places = [slice(end - s.rows.shape[1] * len(s.weight), end) for end, s in zip(ends, sites, strict=True)]
    sums, regimes = torch.zeros(1, ends[-1]), torch.zeros(6, ends[-1])
    waiting, seen = TakenRows(), []
    collectors = ((sums, ResponsivenessCollector("output_derivative", False)), (regimes, RegimeCollector(0.1, True)))

    def evaluate(batch: Batch) -> None:
        assert batch.rows.dtype == torch.float32
        assert batch.rows.numel() <= max(most, batch.rows.shape[2])
        seen.append(len(batch.sites))
        for into, collector in collectors:
            batch.add_to(into, places, collector.collect(batch.activation.evaluate(batch.rows), batch.weight))

    with limited_to(most):
        for each in sites:
            # As an activation that works in place does.
            rows = each.rows.clone()
            for batch in waiting.add(RowsOfSite(each.index, each.activation, rows, each.weight), rows):
                evaluate(batch)
            rows.fill_(torch.nan)
        for batch in waiting.take_all():
            evaluate(batch)
    for site, columns in zip(sites, places, strict=True):
        name, rows = site.activation.name, site.rows.double().tolist()
        for network, weights in enumerate(site.weight.tolist()):
            width = site.rows.shape[1]
            own = slice(columns.start + network * width, columns.start + (network + 1) * width)
            values = [[abs(reference.output_derivative(name, z)) for z in row] for row in rows]
            expected = [sum(w * row[i] for w, row in zip(weights, values, strict=True)) for i in range(width)]
            assert sums[0, own].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            mass = [
                sum(w * abs(reference.output(name, row[i])) for w, row in zip(weights, rows, strict=True))
                for i in range(width)
            ]
            assert regimes[:3, own].sum(dim=0).tolist() == pytest.approx(mass, rel=1e-5, abs=1e-5)
    assert sum(seen) >= len(sites)


def test_sites_that_share_an_activation_and_their_tokens_are_evaluated_at_once() -> None:
    weight, waiting = torch.ones(1, 4), TakenRows()
    for index in range(5):
        rows = torch.randn(4, 3)
        assert not list(waiting.add(RowsOfSite(index, GELU if index == 2 else SILU, rows, weight), torch.empty(0)))
    first, second = waiting.take_all()
    assert (first.sites, second.sites) == ([0, 1, 3, 4], [2])
    assert first.weight.data_ptr() == weight.data_ptr()
    assert not list(waiting.take_all())


# ---- whole steps ----


def step(model: PeftModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


class Operations(TorchDispatchMode):
    """Counts operations; views and allocations are none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def operations(layers: int, **mechanisms: Any) -> int:
    model = with_lora(tiny_llama(layers=layers), LLAMA_TARGETS).train()
    optimizer, batch = optimizer_of(model), random_batch(0)

    def counted() -> int:
        step(model, optimizer, batch)
        with Operations() as mode:
            step(model, optimizer, batch)
        return mode.count

    if not mechanisms:
        return counted()
    with nonlinearity_aware(model, optimizer, measure_every=0, **mechanisms):
        return counted()


@pytest.mark.parametrize("max_tokens", [8, None])
def test_a_site_adds_one_operation_to_a_step(max_tokens: int | None) -> None:
    options = {"importance": MASK, "step_scale": StepScaleOptions(), "observer": ObserverOptions(max_tokens=max_tokens)}
    added = [operations(layers, **options) - operations(layers) for layers in (2, 8)]
    assert added[1] - added[0] <= 6
    assert added[0] < 200


def peak_of(run: Callable[[], None]) -> int:
    """The most bytes that were allocated and not freed while something ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "sites"), [(128, 20), (128, 80), (2048, 20)])
def test_waiting_and_evaluating_take_bounded_memory(dtype: torch.dtype, tokens: int, sites: int) -> None:
    # A 32nd of the channels and of the elements that wait where 80 layers of 28,672 channels are trained on a GPU.
    channels, most = 28672 // 32, taken_rows._MOST_ELEMENTS // 32
    z, weight = torch.randn(tokens, channels, dtype=dtype), torch.ones(1, tokens)
    sums = [torch.zeros(1, sites * channels), torch.zeros(6, sites * channels)]
    places = [slice(i * channels, (i + 1) * channels) for i in range(sites)]
    collectors = (ResponsivenessCollector("output_derivative", False), RegimeCollector(0.1, True))

    def run() -> None:
        waiting = TakenRows()
        for index in range(sites):
            for batch in waiting.add(RowsOfSite(index, SILU, z, weight), z):
                values = batch.activation.evaluate(batch.rows)
                for into, collector in zip(sums, collectors, strict=True):
                    batch.add_to(into, places, collector.collect(values, batch.weight))
        assert len(list(waiting.take_all())) <= 1

    with limited_to(most):
        peak = peak_of(run)
    # 16-bit or 32-bit rows that wait, and 15 intermediate values in float32.
    assert peak <= most * (dtype.itemsize + 15 * 4)


def test_activations_that_work_in_place_are_seen_before_they_do() -> None:
    found = []
    for in_place in (False, True):
        model = with_lora(tiny_llama(), LLAMA_TARGETS).train()
        for module in model.modules():
            if hasattr(module, "act_fn"):
                module.act_fn = nn.SiLU(inplace=in_place)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        optimizer = optimizer_of(model)
        observer = ObserverOptions(max_tokens=None)
        with nonlinearity_aware(
            model, optimizer, importance=MASK, step_scale=None, observer=observer, measure_every=1
        ) as controller:
            # Without a mask all rows are looked at where they are.
            step(model, optimizer, {k: v for k, v in random_batch(0, padded=False).items() if k != "attention_mask"})
            assert controller.misalignment is not None
            assert controller.importance is not None
            found.append((*copy.copy(controller.misalignment), controller.importance.responsiveness))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert bool((one != 0).any())
