"""Options, regimes, shares and scales of the activation-specific step scale."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA_TARGETS, PLAIN_SCALE, tiny_llama, with_lora

from na_lora_lightning.core.activations import GELU, KNOWN_ACTIVATIONS, SILU, Activation
from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.step_scale import RegimeCollector, StepScale, is_meaningful, scale_of_shares
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import StepStatistics
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

CPU = torch.device("cpu")


def sites(activation: str = "silu") -> list[GateSite]:
    return discover_gates(with_lora(tiny_llama(activation=activation), LLAMA_TARGETS)).sites


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layer"}, "granularity is 'layer'"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"tau": 1.0}, "tau is 1.0"),
        ({"eta_min": 0.0}, "eta_min is 0.0"),
        ({"eta_min": 1.1}, "eta_min is 1.1"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"matrix_a_factor": 1.5}, "matrix_a_factor is 1.5"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StepScaleOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", KNOWN_ACTIVATIONS[:4], ids=lambda a: a.name)
@given(
    values=st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=12),
    tau=st.sampled_from([0.05, 0.1, 0.3]),
)
def test_regime_sums_equal_the_reference(activation: Activation, values: list[float], tau: float) -> None:
    z = torch.tensor(values, dtype=torch.float64)[:, None]
    sums = RegimeCollector(tau, per_channel=True).collect(activation.evaluate(z), torch.ones(len(z)).double())
    mass, gap_mass = [0.0] * 3, [0.0] * 3
    for value in values:
        regime = reference.regime(activation.name, value, tau)
        mass[regime] += abs(reference.output(activation.name, value))
        gap = abs(reference.homogeneity(activation.name, value) - 1)
        gap_mass[regime] += abs(reference.output(activation.name, value)) * gap
    assert sums[:, 0].tolist() == pytest.approx([*mass, *gap_mass], rel=1e-6, abs=1e-9)


@given(
    raw=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).filter(lambda v: sum(v) > 0.1),
    gaps=st.lists(st.floats(0.0, 20.0), min_size=3, max_size=3),
    eta_min=st.floats(0.05, 1.0),
)
def test_scale_equals_the_reference_and_stays_in_range(raw: list[float], gaps: list[float], eta_min: float) -> None:
    shares = [value / sum(raw) for value in raw]
    gap_shares = [p * g for p, g in zip(shares, gaps, strict=True)]
    found = scale_of_shares(
        torch.tensor(shares, dtype=torch.float64)[:, None],
        torch.tensor(gap_shares, dtype=torch.float64)[:, None],
        eta_min,
    ).item()
    assert found == pytest.approx(reference.step_scale(shares, gap_shares, eta_min), abs=1e-6)
    assert eta_min - 1e-9 <= found <= 1.0 + 1e-9


def test_a_partition_needs_two_regimes_with_five_percent() -> None:
    shares = torch.tensor([[0.04, 0.05, 0.0], [0.0, 0.0, 0.02], [0.96, 0.95, 0.98]])
    assert is_meaningful(shares).tolist() == [False, True, False]


def statistics(*columns: list[float]) -> StepStatistics:
    return StepStatistics(torch.tensor(columns).T.contiguous(), torch.ones(2))


def test_a_site_without_a_meaningful_partition_has_a_scale_of_exactly_one() -> None:
    options = StepScaleOptions(granularity="site", normalize=False)
    scale = StepScale(options, sites(), Layout([(1, 1), (1, 1)], CPU))
    scale.update(statistics([0.0, 0.5, 0.5, 0.0, 0.4, 0.0], [0.0, 0.01, 0.99, 0.0, 0.4, 0.0]))
    mean_gap = 0.4 / 0.5
    assert scale.scale.tolist() == pytest.approx([0.5 / (1 + mean_gap) + 0.5, 1.0], abs=1e-6)
    assert scale.scale[1].item() == 1.0


def test_normalised_scales_have_mean_one_over_what_they_span() -> None:
    found = sites()
    by_site = StepScale(StepScaleOptions(granularity="site", normalize=True), found, Layout([(1, 1), (1, 1)], CPU))
    by_site.update(statistics([0.0, 0.5, 0.5, 0.0, 0.4, 0.0], [0.2, 0.3, 0.5, 0.9, 0.1, 0.0]))
    assert by_site.scale.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert by_site.scale[0] > by_site.scale[1]
    channels = [(1, site.channels) for site in found]
    by_channel = StepScale(StepScaleOptions(granularity="channel", normalize=True), found, Layout(channels, CPU))
    mass = torch.rand(6, sum(site.channels for site in found)) + 0.2
    by_channel.update(StepStatistics(mass, torch.ones(2)))
    for columns in by_channel.layout.slices:
        assert by_channel.scale[columns].mean().item() == pytest.approx(1.0, abs=1e-5)
        assert by_channel.scale[columns].std() > 0


def test_activations_get_one_scale_each() -> None:
    found = sites()
    found[1].activation = GELU
    scale = StepScale(StepScaleOptions(**PLAIN_SCALE), found, Layout([(1, 1), (1, 1)], CPU))
    scale.update(statistics([0.1, 0.4, 0.5, 0.5, 0.1, 0.0], [0.3, 0.3, 0.4, 0.9, 0.1, 0.0]))
    assert scale.activations == ["gelu", SILU.name]
    expected = [
        reference.step_scale([0.1, 0.4, 0.5], [0.5, 0.1, 0.0], 0.1),
        reference.step_scale([0.3, 0.3, 0.4], [0.9, 0.1, 0.0], 0.1),
    ]
    assert scale.scale.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_activations_without_a_partition_are_refused(activation: str) -> None:
    with pytest.raises(ConfigurationError, match=r"the step scale is exactly 1 for relu.*leave StepScaleCallback out"):
        StepScaleOptions().check_activations(sites(activation))
    # There is still the step of A.
    StepScaleOptions(matrix_a_factor=0.25).check_activations(sites(activation))


def test_normalising_the_only_activation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="silu is the only activation"):
        StepScaleOptions(**{**PLAIN_SCALE, "normalize": True}).check_activations(sites())


def test_state_restores_exactly_and_another_granularity_is_refused() -> None:
    found = sites()
    first, second = (
        StepScale(StepScaleOptions(granularity="site", normalize=False), found, Layout([(1, 1), (1, 1)], CPU))
        for _ in range(2)
    )
    steps = [StepStatistics(torch.rand(6, 2), torch.ones(2)) for _ in range(5)]
    for step in steps[:2]:
        first.update(step)
    second.load_state_dict(first.state_dict())
    for step in steps[2:]:
        first.update(step)
        second.update(step)
    assert torch.equal(first.scale, second.scale)
    by_channel = StepScale(StepScaleOptions(granularity="channel"), found, Layout([(1, 24), (1, 24)], CPU))
    with pytest.raises(ConfigurationError, match="granularity='site' and this run has 'channel'"):
        by_channel.load_state_dict(first.state_dict())
