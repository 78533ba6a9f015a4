"""The whole method against the slow reference, over random models, shapes, paddings and accumulations."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from method_oracle import Oracle, two_blocks

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import Criterion, ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import Granularity, StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions

ALL_TOKENS = ObserverOptions(max_tokens=None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    activations=st.sampled_from([("silu", "gelu"), ("gelu_tanh", "silu"), ("silu", "silu")]),
    widths=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    criterion=st.sampled_from(
        ["selection_derivative", "output_derivative", "homogeneity_gap", "output_derivative_change"]
    ),
    keep_fraction=st.floats(0.05, 1.0),
    scope=st.sampled_from(["site", "global"]),
    granularity=st.sampled_from(["activation", "site", "channel"]),
    normalize=st.booleans(),
    accumulation=st.integers(1, 3),
    padded=st.booleans(),
    warmup=st.integers(0, 2),
    refresh_every=st.integers(1, 3),
    matrix_a_factor=st.sampled_from([1.0, 0.25, 0.0]),
)
def test_weights_and_updates_equal_the_reference(
    seed: int,
    activations: tuple[str, str],
    widths: tuple[int, int],
    criterion: Criterion,
    keep_fraction: float,
    scope: str,
    granularity: Granularity,
    normalize: bool,
    accumulation: int,
    padded: bool,
    warmup: int,
    refresh_every: int,
    matrix_a_factor: float,
) -> None:
    assume(not (normalize and granularity == "activation" and activations[0] == activations[1]))
    importance = ImportanceOptions(
        keep_fraction=keep_fraction,
        criterion=criterion,
        scope=scope,  # type: ignore[arg-type]
        warmup_steps=warmup,
        refresh_every=refresh_every,
    )
    scale = StepScaleOptions(granularity=granularity, normalize=normalize, matrix_a_factor=matrix_a_factor)
    model = two_blocks(*activations, widths, seed)
    blocks = model.get_base_model()
    gates = discover_gates(model, {"x": torch.randn(1, 3, 6)}).require()
    controller = GateController(model, gates, ALL_TOKENS)
    controller.set_importance(importance)
    controller.set_step_scale(scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    controller.attach([optimizer])
    oracle = Oracle(importance, scale, activations)
    generator = torch.Generator().manual_seed(seed)

    for step in range(1, 5):
        for kept in blocks.kept:
            kept.clear()
        optimizer.zero_grad()
        for _ in range(accumulation):
            batch, length = 2, 4
            x = torch.randn(batch, length, 6, generator=generator)
            mask = None
            if padded:
                lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
                mask = (torch.arange(length) < lengths).long()
                x = x.masked_fill(mask[..., None] == 0, 100.0)
            model(x=x, attention_mask=mask).square().mean().backward()
        twin, twin_optimizer = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        for own, other in zip(model.parameters(), twin, strict=True):
            other.grad = None if own.grad is None else own.grad.clone()
        plain = torch.optim.AdamW(twin, lr=0.05, weight_decay=0.1)
        plain.load_state_dict(twin_optimizer)
        names = [name for name, _ in model.named_parameters()]
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer.step()
        plain.step()
        after = dict(zip(names, twin, strict=True))

        tokens = [torch.cat(kept).tolist() for kept in blocks.kept]
        expected = oracle.weights(step, tokens)
        found = controller.weights.split(list(widths))
        for site in range(2):
            # E - 1 is rounded as E is, in float32.
            assert found[site].tolist() == pytest.approx(expected[site], abs=4e-6, rel=1e-6)
            columns = controller.layout.site_slices[site]
            if oracle.history[site]:
                average = oracle.average(oracle.history[site], importance.beta)
                found_average = controller.importance.importance[columns].tolist()  # type: ignore[union-attr]
                assert found_average == pytest.approx(average, abs=1e-6, rel=1e-6)
            shares = oracle.average(oracle.site_history[site], scale.beta)
            found_shares = controller.step_scale.network_shares[:, site].tolist()  # type: ignore[union-attr]
            assert found_shares == pytest.approx(shares, abs=1e-6)
        for name, parameter in model.named_parameters():
            gate = next((i for i in range(2) if f"gate_{i}.lora_B" in name), None)
            weights = expected[gate] if gate is not None else None
            if matrix_a_factor < 1.0 and "gate_" in name and "lora_A" in name:
                weights = [matrix_a_factor] * len(parameter)
            if weights is None:
                assert torch.equal(parameter, after[name]), name
            else:
                rows = reference.update_rows(before[name].tolist(), after[name].tolist(), weights)
                assert torch.allclose(parameter, torch.tensor(rows), atol=1e-6), name
