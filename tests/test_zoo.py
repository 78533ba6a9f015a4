"""A representative dozen of the model zoo, and proof that the zoo sees a wrong map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import check as zoo_check
from zoo import report
from zoo.check import Verdict, check
from zoo.tables import Outcome, document, share_right
from zoo.tiny_models import Mapping, build

from na_lora_lightning.callbacks import session
from na_lora_lightning.core.activations import KNOWN_ACTIVATIONS
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.observation import passes, routed_rows
from na_lora_lightning.core.pre_activations import GateMethod, LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.core.stepping import rows as update

Mutation = Callable[[GateMap], None]


@pytest.mark.parametrize(
    ("mapping", "model_type", "sites", "networks", "activation", "kind"),
    [
        # Separate layers, one fused layer, and GPT-2's Conv1D.
        ("causal-lm", "llama", 2, 2, "silu", "gated"),
        ("causal-lm", "phi3", 2, 2, "silu", "gated"),
        ("causal-lm", "gpt2", 2, 2, "gelu_tanh", "plain"),
        # A scalar and an adapter before the activation.
        ("causal-lm", "falcon_h1", 2, 2, "silu", "gated"),
        ("causal-lm", "zamba2", 4, 4, "gelu", "gated"),
        # One activation module for all layers, learnt sparsity, and squared ReLU.
        ("causal-lm", "openai-gpt", 2, 2, "gelu_tanh", "plain"),
        ("causal-lm", "gemma3n_text", 4, 4, "gelu_tanh", "gated"),
        ("causal-lm", "nemotron", 2, 2, "relu_squared", "plain"),
        # A function instead of an activation module: dense, and in experts with interleaved gates.
        ("causal-lm", "lfm2", 2, 2, "silu", "gated"),
        ("causal-lm", "gpt_oss", 3, 12, "quick_gelu", "gated"),
        # Stacked experts, transposed ones, and ones beside shared experts and dense layers.
        ("causal-lm", "mixtral", 3, 12, "silu", "gated"),
        ("causal-lm", "llama4_text", 5, 11, "silu", "gated"),
        ("causal-lm", "deepseek_v3", 5, 11, "silu", "gated"),
        ("image-text-to-text", "qwen2_5_vl", 2, 2, "silu", "gated"),
        # A decoder alone in a model that may also hold an encoder-decoder.
        ("image-text-to-text", "blip-2", 2, 2, "relu", "plain"),
        # Halves with lengths of their own, and experts in a dictionary.
        ("seq2seq", "bart", 4, 4, "gelu", "plain"),
        ("seq2seq", "t5gemma", 4, 4, "gelu_tanh", "gated"),
        ("masked-lm", "bert", 2, 2, "gelu", "plain"),
        ("masked-lm", "modernbert", 2, 2, "gelu", "gated"),
        ("text-encoding", "roberta", 2, 2, "gelu", "plain"),
        # Padded patches, and a norm over all places.
        ("image-classification", "siglip2", 3, 3, "gelu_tanh", "plain"),
        ("image-classification", "convnextv2", 4, 4, "gelu", "plain"),
        # Frames that stand for several, in one half and alone.
        ("speech", "whisper", 4, 4, "gelu", "plain"),
        ("speech", "parakeet_ctc", 4, 4, "silu", "plain"),
    ],
)
def test_every_row_and_every_step_is_right(
    mapping: Mapping, model_type: str, sites: int, networks: int, activation: str, kind: str
) -> None:
    verdict = check(build(mapping, model_type))
    assert verdict.problems == []
    assert verdict.right
    assert (verdict.sites, verdict.networks) == (sites, networks)
    assert (verdict.activations, verdict.kinds) == ([activation], [kind])
    assert verdict.found_blocks == verdict.expected_blocks > 0


def test_a_model_without_feed_forward_blocks_is_refused_for_that() -> None:
    verdict = check(build("causal-lm", "mamba2"))
    assert verdict.refused == "it has no feed-forward block"
    assert verdict.problems == []
    assert not verdict.right


def shift(site: GateSite, by: int = 1) -> None:
    """The rows beside the right ones; where the pre-activation is made from rows, those that it is made from too."""
    outputs = site.parameters()[0].parameter.shape[0]
    site.rows = (site.rows + by) % outputs
    if isinstance(site.source, (LayerOutput, GateMethod)):
        features = (site.source.channels.features + by) % outputs
        channels = dataclasses.replace(site.source.channels, features=features)
        site.source = dataclasses.replace(site.source, channels=channels)


def shift_all(gates: GateMap) -> None:
    for site in gates:
        shift(site)


def shift_to_other_half(gates: GateMap) -> None:
    for site in gates:
        shift(site, site.channels)


def swap_two(gates: GateMap) -> None:
    for site in gates:
        order = torch.arange(site.channels)
        order[[3, 4]] = order[[4, 3]]
        site.rows = site.rows[order]


def call_it_plain(gates: GateMap) -> None:
    gates.sites[0].kind = "plain"


def call_it_gelu(gates: GateMap) -> None:
    gates.sites[0].activation = next(activation for activation in KNOWN_ACTIVATIONS if activation.name == "gelu")


def miss_one(gates: GateMap) -> None:
    del gates.sites[-1]


def use_token_order(gates: GateMap) -> None:
    for site in gates:
        assert site.experts is not None
        site.experts.arrangement = "in_token_order"


def mutated(monkeypatch: pytest.MonkeyPatch, model_type: str, mutation: Mutation) -> Verdict:
    """The verdict on a type where the discovery answers wrongly, to the checks and to the callbacks alike."""

    def discover(*args: Any) -> GateMap:
        gates = discover_gates(*args)
        mutation(gates)
        return gates

    monkeypatch.setattr(zoo_check, "discover_gates", discover)
    monkeypatch.setattr(session, "discover_gates", discover)
    return check(build("causal-lm", model_type))


@pytest.mark.parametrize(
    ("model_type", "mutation", "seen"),
    [
        ("llama", shift_all, "channel 0: in the pre-activation channel 1 changes instead"),
        ("phi3", shift_all, "channel 0: in the pre-activation channel 1 changes instead"),
        ("phi3", shift_to_other_half, "channel 0: moving row 24 of lora_B changes nothing"),
        ("gpt2", swap_two, "channel 3: in the pre-activation channel 4 changes instead"),
        ("lfm2", shift_all, "channel 0: in the gated result channel 1 changes instead"),
        # Beside each gate stands the other branch, so that the channel is right and its response is not.
        ("gpt_oss", shift_all, "channel 0 expert 0: the gated result does not follow quick_gelu"),
        ("mixtral", shift_all, "channel 0 expert 0: in the pre-activation channel 1 changes instead"),
        ("mixtral", use_token_order, "the statistics are of other tokens or channels than the real ones"),
        ("llama", call_it_plain, "is not plain"),
        ("llama", call_it_gelu, "does not compute gelu"),
        ("lfm2", call_it_gelu, "the gated result does not follow gelu"),
        ("llama", miss_one, "the feed-forward block model.layers.1.mlp (silu) has no site"),
    ],
)
def test_a_wrong_map_is_seen(monkeypatch: pytest.MonkeyPatch, model_type: str, mutation: Mutation, seen: str) -> None:
    verdict = mutated(monkeypatch, model_type, mutation)
    assert any(seen in problem for problem in verdict.problems), verdict.problems
    assert not verdict.right


def test_swapped_experts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    by_expert = routed_rows._by_expert

    def swapped(count: int, of_row: Tensor, weight: Tensor) -> Tensor:
        return by_expert(count, of_row, weight)[[1, 0, *range(2, count)]]

    monkeypatch.setattr(routed_rows, "_by_expert", swapped)
    verdict = check(build("causal-lm", "mixtral"))
    assert any("expert 0: " in problem for problem in verdict.problems)


def test_columns_of_other_experts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_blocks(parameter: Tensor, networks: int) -> Tensor:
        return parameter if networks == 1 else parameter.view(parameter.shape[0], networks, -1).transpose(1, 2)

    monkeypatch.setattr(update, "by_network", in_blocks)
    verdict = check(build("causal-lm", "mixtral"))
    assert verdict.rows_right
    assert any("moved although masked" in problem for problem in verdict.problems)


def test_counted_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "token_mask_of_call", lambda *args: None)
    verdict = check(build("causal-lm", "llama"))
    assert verdict.problems[0].endswith("statistics of 32 tokens, and 27 are real")


@pytest.mark.parametrize(("mapping", "counted"), [("seq2seq", 24), ("masked-lm", 32)])
def test_counted_padding_of_halves_and_encoders_is_seen(
    monkeypatch: pytest.MonkeyPatch, mapping: Mapping, counted: int
) -> None:
    monkeypatch.setattr(passes, "token_mask_of_call", lambda *args: None)
    monkeypatch.setattr(passes, "mask_of_branch", lambda *args: None)
    verdict = check(build(mapping, "bart" if mapping == "seq2seq" else "bert"))
    assert any(f"statistics of {counted} tokens, and " in problem for problem in verdict.problems), verdict.problems


def test_a_process_for_each_type() -> None:
    found = {
        o.model_type: o for o in report.examine_all([("causal-lm", "gpt2"), ("causal-lm", "gemma4_assistant")], jobs=1)
    }
    assert found["gpt2"].is_right
    assert found["gemma4_assistant"].not_buildable is not None
    assert not found["gemma4_assistant"].is_red


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SECONDS", 0.01)
    (outcome,) = report.examine_all([("causal-lm", "gpt_oss")], jobs=1)
    assert outcome.error == "no answer within 0 s"
    assert outcome.is_red


def test_the_page_counts_and_explains() -> None:
    right = Verdict("causal-lm", "a", 2, 8, 48, ["silu"], ["gated"], 2, 2, rows_right=True, trained=True)
    refused = Verdict("causal-lm", "b", refused="it has no feed-forward block")
    wrong = Verdict("causal-lm", "c", 2, 2, 48, ["silu"], ["gated"], 2, 2, trained=True, problems=["one", "two"])
    outcomes = [
        *(Outcome("causal-lm", verdict.model_type, verdict=verdict) for verdict in (right, refused, wrong)),
        Outcome("causal-lm", "d", not_buildable="it has no forward"),
        Outcome("causal-lm", "e", error="ValueError: no"),
    ]
    assert [outcome.is_red for outcome in outcomes] == [False, False, True, False, True]
    assert share_right(outcomes) == 0.25
    page = document(outcomes)
    assert (
        "5 types, 4 buildable, 1 of these fully right (25.0%), 1 refused for a reason, 2 wrong or unexplained." in page
    )
    assert "- `b`: it has no feed-forward block.\n" in page
    assert "| `a` | 2 | 8 | silu | gated | yes | yes |  |\n" in page
    assert "| `c` | 2 |  | silu | gated | **no** | yes | one (and 1 more) |\n" in page
    assert "- `c`: one (and 1 more).\n- `e`: ValueError: no.\n" in page
    assert "| `e` |  |  |  |  |  |  | **error** |\n" in page


def test_the_page_keeps_sections_of_other_mappings_and_counts_what_has_blocks() -> None:
    right = Verdict("causal-lm", "a", 2, 8, 48, ["silu"], ["gated"], 2, 2, rows_right=True, trained=True)
    nothing = Verdict("masked-lm", "b", refused="its layers are grouped convolutions", nothing_to_find=True)
    other = dataclasses.replace(right, mapping="masked-lm", model_type="c")
    causal = Outcome("causal-lm", "a", verdict=right)
    masked = [Outcome("masked-lm", verdict.model_type, verdict=verdict) for verdict in (nothing, other)]
    page = document(masked, document([causal]))
    assert page == document([causal, *masked])
    assert "nothing to find; of the other 1, 100.0% are right.\n" in page
