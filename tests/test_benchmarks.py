"""The page of the benchmarks says the numbers that were measured, and what is measured is what it says."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WHERE = {"device": "a processor", "threads": 1, "torch": "2.13.0", "cores": 2, "load": 2.74}


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def rows_of(text: str, arm: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    from framework_arms import WORKLOADS
    from page import draw, page

    step = {"model": "small", "dtype": "float32", "tokens": "8x64", "rounds": 5}
    steps = [
        {**step, "arm": "PEFT LoRA", "median_ms": 100.0, "of_medians": 1.0, "of_minima": 1.0},
        {**step, "arm": "LoRA", "median_ms": 91.25, "of_medians": 0.9125, "of_minima": 0.9},
    ]
    counts = {name: {"operations": 5646, "of_operations": 0.5} for name in ("fused", "default")}
    counts["default"] = {"operations": 11104, "of_operations": 0.25}
    gpu = {"LoRA": {"operations": 5380, "of_operations": 0.865}}
    work = {"step_seconds": 2.5, "targets_per_second": 19.2, "tokens_per_second": 1234.5, "peak_gib": 1.5}
    grown = {"PEFT LoRA": 1.0, "LoRA": 0.95, "NA-LoRA, 128 tokens a site": 0.975, "NA-LoRA, all tokens": 1.0125}
    results: dict[str, Any] = {
        "step": {"where": WHERE, "rows": steps},
        "operations": {"arms": {"LoRA": {**counts, "peak_mib": 1240.6, "of_peak": 0.7975}}},
        "gpu_step": {"where": WHERE, "rows": []},
        "gpu_operations": {"arms": gpu},
        "frameworks": {"where": WHERE, "rows": [{"workload": "short", "arm": "trainer", "ratio": 1.5, **work}]},
        "growth": {
            "where": WHERE,
            "rows": [{"axis": "rank", "value": 32, "reference_ms": 12.4, "of_medians": grown}],
        },
        "curves": {"steps": 200, "tokens": "2x16", "blocks": 8, "first": 4, "last": 2, "largest_difference": 3e-5},
    }
    text = page(results)
    assert rows_of(text, "LoRA") == [
        ["91.2", "0.912", "0.900", "0.92"],
        ["5,646", "0.500", "11,104", "0.250", "1,241", "0.797"],
        ["5,380", "0.865", "", ""],
    ]
    assert rows_of(text, "transformers' Trainer and PEFT") == [["2.50", "19", "1,234", "1.50", "1.50"]]
    assert rows_of(text, "rank") == [["32", "12", "0.950", "0.975", "1.012"]]
    assert "a processor, one thread, torch 2.13.0, 2 cores with a load of 2.7, processor time." in text
    assert "in 200 steps" in text
    assert "differs by 3.0e-05 at most" in text
    assert text.count("Not measured") == 1
    assert f"Not measured yet: {WORKLOADS['all']}; {WORKLOADS['mixed']}." in text
    assert page({}).count("Not measured yet.") == 5
    for each in (results, {}):
        draw(each, tmp_path / "figure.svg")
        assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_the_page_of_the_repository_is_that_of_its_results() -> None:
    from page import page

    results = {path.stem: json.loads(path.read_text()) for path in sorted((BENCHMARKS / "results").glob("*.json"))}
    assert (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page(results)


def test_a_cell_of_growth_changes_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    import growth

    asked: list[Any] = []

    def in_turn(arms: Any, tokens: Any, rounds: int, steps: int, limit: float) -> dict[str, list[float]]:
        trained = {id(p): p.numel() for p in arms["LoRA"].model.parameters() if p.requires_grad}
        asked.append((tuple(tokens.shape), sum(trained.values())))
        return {name: [1.0 + place, 2.0 + place, 6.0 + place] for place, name in enumerate(arms)}

    monkeypatch.setattr(growth, "in_turn", in_turn)
    monkeypatch.setattr(growth, "ARMS", ("PEFT LoRA", "LoRA"))
    monkeypatch.setitem(growth.LLAMA, "hidden_size", 16)
    monkeypatch.setitem(growth.LLAMA, "intermediate_size", 24)
    monkeypatch.setitem(growth.LLAMA, "num_hidden_layers", 2)
    row = growth.measure("rank", 8, 3, 1)
    assert row["reference_ms"] == 2000.0
    assert (row["of_medians"], row["of_minima"]) == ({"PEFT LoRA": 1.0, "LoRA": 1.5}, {"PEFT LoRA": 1.0, "LoRA": 2.0})
    for axis, value in (("rank", 16), ("length", 8), ("layers", 1), ("sites", 1)):
        growth.measure(axis, value, 3, 1)
    first, of_rank, of_length, of_layers, of_sites = asked
    assert of_rank == (first[0], 2 * first[1])
    assert of_length == ((4, 8), first[1])
    assert of_layers == of_sites == (first[0], first[1] // 2)


def test_arms_take_turns_and_the_first_rounds_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_step

    order: list[str] = []

    def seconds_of(arm: str, tokens: Any, steps: int) -> float:
        order.append(arm)
        return float(len(order))

    monkeypatch.setattr(lora_step, "seconds_of", seconds_of)
    arms: dict[str, Any] = {name: name for name in "abc"}
    found = lora_step.in_turn(arms, torch.zeros(1), rounds=2, steps=1, limit=1e9)
    assert "".join(order) == "abcbcacababc"
    assert found == {"a": [8.0, 10.0], "b": [9.0, 11.0], "c": [7.0, 12.0]}


def test_kernels_are_counted_and_overlap_is_busy_once() -> None:
    from lora_arms import counted

    def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CUDA) -> Any:
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    events = [event("gemm", 0, 1000), event("add", 500, 1500), event("Memcpy HtoD", 2000, 2500)]
    events += [event("Optimizer.step#AdamW.step", 0, 9000), event("aten::mm", 0, 9000, DeviceType.CPU)]
    assert counted(events) == {"kernels": 2, "copies": 1, "busy_ms": 2.0}


def test_both_layers_lose_alike_and_a_fused_optimizer_is_one_operation() -> None:
    from lora_arms import Arm, adapted, base_model, make_arm, random_tokens
    from lora_operations import launches
    from torch.profiler import ProfilerActivity, profile

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, tokens = base_model(sizes), random_tokens("2x4")
    ours, theirs = ([arm.step(tokens).item() for _ in range(5)] for arm in (Arm(adapted(base, on)) for on in (1, 0)))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0]
    found = {}
    for fused in (True, None):
        with ExitStack() as stack:
            arm = make_arm("LoRA", base, stack, fused)
            arm.step(tokens)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                arm.step(tokens)
            found[fused] = launches(profiled.events())
    assert (found[True]["_fused_adamw_"], found[None]["_fused_adamw_"]) == (1, 0)
    # Of 14 parameters.
    assert found[None]["addcdiv_"] - found[True]["addcdiv_"] == 14
