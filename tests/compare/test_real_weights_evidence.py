"""What the comparison on real weights says is made of its export alone, and of part of one too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.real_weights.curves import at_equal_loss, draw
from benchmarks.real_weights.evidence import HYPOTHESES, Claim, Export, answers, judged, page_parts
from na_lora_lightning.compare.grid import ScoredCell
from na_lora_lightning.compare.page import as_csv
from na_lora_lightning.compare.plan import Cell

RATES = (5e-4, 1e-3, 2e-3)
# Change of test loss at every rate but the highest, and there.
LEVELS = {
    "lora": (1.0, 1.0),
    "na_lora": (1.0005, 1.0005),
    "plain_reading": (1.01, 0.98),
    "short_step": (1.001, 0.97),
    "random_mask": (1.02, 1.02),
    "lora_plus": (0.98, 1.0),
}


def cell(task: str, arm: str, rate: float, seed: int) -> ScoredCell:
    usual, highest = LEVELS[arm]
    noise = 1 + 1e-4 * ((3 * seed + len(arm) + len(task)) % 5 - 2)
    valley = 2 + 0.2 * abs(math.log2(rate / 1e-3))
    loss = valley * (highest if rate == RATES[-1] else usual) * noise
    kl = rate * 100 * (0.5 if arm == "short_step" else 1.0)
    result = {"validation": loss, "test": loss, "other_loss": 3.1, "base_other_loss": 3.0, "other_kl": kl}
    result |= {"own_kl": 2 * kl, "seconds": 36.0, "peak_memory": None, "steps": 60, "parameters": 9, "device": "cpu"}
    return ScoredCell(Cell(task, arm, rate, seed), loss, result)


def written(folder: Path, *skipped: tuple[str, float, int], arms: tuple[str, ...] = tuple(LEVELS)) -> Export:
    cells = [
        cell(task, arm, rate, seed)
        for task in ("spell", "riddles")
        for arm in arms
        for rate in RATES
        for seed in range(3)
        if (arm, rate, seed) not in skipped
    ]
    (folder / "some.csv").write_text(as_csv(cells))
    return Export(folder / "some.csv")


def test_each_hypothesis_gets_what_was_measured_and_a_verdict(tmp_path: Path) -> None:
    export = written(tmp_path)
    rows = {row[0].split(".")[0]: row for row in answers(export)}
    # Without those of arms that were not run.
    assert list(rows) == [f"R{number}" for number in (1, 2, 3, 4, 6, 12, 13)]
    verdicts = {name: row[3] for name, row in rows.items()}
    found = {name: verdicts[name] for name in ("R1", "R2", "R3", "R4", "R6", "R12")}
    # R3 has one control of two and R4 one of two; what is not run leaves them open unless another speaks against them.
    assert found == {
        "R1": "supported", "R2": "supported", "R3": "not", "R4": "open", "R6": "not", "R12": "open",
    }  # fmt: skip
    assert "`na_lora` +0.05 (" in rows["R1"][2]
    assert rows["R1"][1:2] == ["±0.5"]
    assert "`rslora` not run" in rows["R4"][2]
    assert (rows["R1"][4], rows["R3"][4]) == ("supported: riddles, spell", "not: riddles, spell")
    assert "`random_mask` to `na_lora` +1.9" in rows["R3"][2]
    assert "`short_step` -3.01 (" in rows["R12"][2]


def test_an_equal_range_has_to_hold_the_interval(tmp_path: Path) -> None:
    row = next(row for row in written(tmp_path).tuned.rows if row.arm == "plain_reading")
    assert row.estimate.mean == pytest.approx(1.0, abs=0.02)
    assert judged(Claim("plain_reading", 0.5, 1.5, within=True), row) == "supported"
    assert judged(Claim("plain_reading", 0.5, 1.001, within=True), row) == "open"
    assert judged(Claim("plain_reading", -0.5, 0.5, within=True), row) == "not"
    assert judged(Claim("plain_reading", -0.5, math.inf, within=True), row) == "supported"
    assert judged(Claim("plain_reading", -math.inf, 0.0), row) == "not"


def test_forgetting_is_compared_at_equal_loss(tmp_path: Path) -> None:
    # LoRA is between 5e-4 (loss 2.2, KL 0.05) and 1e-3 (2.0, 0.1); the arm is at 2.002 with half of 0.1.
    ratio = at_equal_loss(written(tmp_path), "short_step")["spell"]
    assert ratio == pytest.approx(0.05 / math.exp(math.log(0.1) - 0.01 * math.log(2)), rel=2e-3)


def test_a_part_of_a_comparison_is_a_page_that_says_so(tmp_path: Path) -> None:
    assert page_parts(tmp_path)["real_weights"] == "No cell on real weights is in the tree yet."
    export = written(tmp_path, ("na_lora", RATES[0], 2))
    text = page_parts(tmp_path)
    assert "106 cells, 1.1 hours of training on cpu; 2 tasks" in text["real_weights"]
    assert "2 cells of that grid are missing or left out." in text["real_weights"]
    assert "Not run: `activation_scale`, `dora`, " in text["real_weights"]
    assert len([line for line in text["real_weights"].splitlines() if line.startswith("| R")]) == 7
    assert "| `lora_plus` | -2.0" in text["real_weights_tables"]
    assert text["weights"]["some"]["lora_plus"]["spell"].startswith("-2.0")
    figures = [file.read_bytes() for file in draw(export, tmp_path)]
    assert figures == [file.read_bytes() for file in draw(export, tmp_path)]
    assert page_parts(tmp_path) == text


def test_a_magnitude_can_move_by_its_rate_in_each_step(tmp_path: Path) -> None:
    from benchmarks.real_weights.magnitudes import of_export, of_study, page_part, rank_correlation, row_norm

    weights = {
        "layer": torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]),
        "embed": torch.ones(9, 9),
        "b": torch.ones(3),
    }
    assert (row_norm(weights, False), row_norm(weights, True)) == (2.0, pytest.approx((9**0.5 + 21**0.5) / 2))
    results = [
        {
            "run_info": {"train_config": {
                "setting": "tiny.x", "arm_name": arm, "rate": rate, "seed": seed, "training": {"steps": 200},
            }},
            "train_info": {"status": "success", "metrics": [{"test loss": loss * (1 + seed)}]},
        }
        for rate, plain in ((0.01, 1.0), (0.02, 0.9), (0.04, 1.2))
        for arm, loss in (("lora", plain), ("dora", plain * (1 - rate)))
        for seed in range(2)
    ]  # fmt: skip
    points = of_study(results, {"tiny": 4.0})
    assert [point.move for point in points] == pytest.approx([0.25, 0.5, 1.0])
    assert [point.gain for point in points] == pytest.approx([-1.0, -2.0, -4.0])
    assert [point.is_usual for point in points] == [True, True, False]
    assert rank_correlation(points) == pytest.approx(-1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(LEVELS, "dora", (0.99, 0.97))
        own = of_export(written(tmp_path, arms=("lora", "dora")), {"SmolLM2-135M": 3.0})
    assert [point.move for point in own] == pytest.approx([60 * rate / 6 for rate in RATES] * 2)
    assert [point.gain for point in own] == pytest.approx([-1.0, -1.0, -3.0] * 2, abs=0.05)
    assert page_part([*points, *own])["here"] == "0.5 to 1.0"


def test_one_arm_is_a_page_too(tmp_path: Path) -> None:
    written(tmp_path, arms=("lora",))
    assert [line for line in page_parts(tmp_path)["real_weights"].splitlines() if "R1." in line] == []


def test_hypotheses_are_those_that_were_written_down() -> None:
    text = (Path(__file__).parents[2] / "benchmarks/real_weights/hypotheses.md").read_text()
    for name, (_, claims) in HYPOTHESES.items():
        part = text.split(f"**{name}. ")[1].split("- **R")[0]
        assert all(f"`{claim.arm}`" in part or claim.arm == "lora_plus" for claim in claims)
