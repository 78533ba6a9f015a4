"""Statistics against scipy and numbers worked out by hand; the pages of evidence made from results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import StudyError
from benchmarks.study.cells import recorded
from benchmarks.study.report.comparison import bootstrap_interval, compare, holm, sign_test, verdicts
from benchmarks.study.report.evidence import DOCUMENTS, EvidenceTable, make_pages, make_tables, write_evidence
from benchmarks.study.report.mechanism import mechanisms
from benchmarks.study.report.tables import Sources, at_equal_forgetting

RATES = (1.0, 2.0, 4.0)
SETTING = "llama-silu.functions.r4-all-linear"


def result(
    arm: str, rate: float, seed: int, valid: float | None, test: float, setting: str = "s", seconds: float = 1.0
) -> dict[str, Any]:
    """A result with what reports read; forgetting is 0.25 at the first and 0.5 at the last interval."""

    def entry(step: int, valid_loss: float | None, test_loss: float, held_out: float) -> dict[str, Any]:
        return {
            "step": step,
            "valid loss": valid_loss,
            "test loss": test_loss,
            "test accuracy": 0.5,
            "held-out loss": held_out,
        }

    metrics = [entry(0, 9.0, 9.0, 2.0), entry(5, 0.5, 0.75, 2.25), entry(10, valid, test, 2.5)]
    return {
        "run_info": {"train_config": {"setting": setting, "arm_name": arm, "rate": rate, "seed": seed}},
        "train_info": {
            "status": "success" if valid is not None else "diverged",
            "metrics": metrics,
            "train_time": seconds,
        },
        "study_info": {
            "probes": [{"step": step, "misalignment": [step / 100, None]} for step in (0, 5, 10)],
        },
    }


def test_the_bootstrap_agrees_with_scipy() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, size=40)
    ours = bootstrap_interval([differences])
    reference = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    assert ours == pytest.approx(tuple(reference), abs=0.02)
    assert bootstrap_interval([differences]) == ours


def test_the_bootstrap_draws_within_settings() -> None:
    # Constant within each setting: no draw changes the mean of the settings.
    assert bootstrap_interval([[1.0, 1.0], [4.0, 4.0, 4.0]]) == (2.5, 2.5)
    assert all(map(math.isnan, bootstrap_interval([[1.0], [4.0]])))


def test_the_bootstrap_of_two_values_is_their_binomial() -> None:
    # Means 0, 1/2 and 1 have probabilities 1/4, 1/2 and 1/4.
    assert bootstrap_interval([[0.0, 1.0]], level=0.5 - 1e-9) == pytest.approx((0.0, 1.0), abs=0.5)
    assert bootstrap_interval([[0.0, 1.0]], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([[0.0, 1.0]], level=0.95) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-1.0] * 5, (5, 5, 2 / 32)),
        ([-1.0, -2.0, 3.0, 0.0], (2, 3, 1.0)),
        ([-1.0] * 9 + [1.0], (9, 10, 22 / 1024)),
        ([0.0], (0, 0, 1.0)),
    ],
)
def test_the_sign_test(differences: list[float], expected: tuple[int, int, float]) -> None:
    assert sign_test(differences) == pytest.approx(expected)


def test_holm() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def example() -> list[dict[str, Any]]:
    """The baseline is best at 0.1 and the mask at 0.2 by validation; test losses would choose otherwise."""
    found = []
    for seed, base in ((0, 1.0), (1, 2.0)):
        found += [
            result("lora", 0.1, seed, valid=base, test=base + 1.0, seconds=2.0),
            result("lora", 0.2, seed, valid=base + 0.5, test=base, seconds=2.0),
            result("mask", 0.1, seed, valid=base + 0.1, test=base - 0.5, seconds=3.0),
            result("mask", 0.2, seed, valid=base - 0.1, test=base + 0.75 - 0.5 * seed, seconds=3.0),
            result("mask", 0.4, seed, valid=None, test=1.0, seconds=3.0),
        ]
    return found


def test_rates_are_chosen_by_validation_and_scored_on_test() -> None:
    found = compare(example(), "lora")["s"]
    assert (found["lora"].rate, found["mask"].rate) == (0.1, 0.2)
    assert found["lora"].at_edge
    assert not found["mask"].at_edge
    assert found["mask"].differences == pytest.approx({0: -0.25, 1: -0.75})
    assert found["mask"].average("forgetting") == pytest.approx(0.5)
    assert found["mask"].average("misalignment") == pytest.approx(0.1)


def test_interpolation_compares_at_the_bottom_of_the_curve() -> None:
    # Both arms have the same curve of losses over rates; the second is moved by 0.6 steps of the grid.
    found = []
    for arm, shift in (("lora", 0.0), ("cut", 0.6)):
        for exponent in range(-4, 1):
            for seed in (0, 1):
                loss = (exponent - shift + 1.75) ** 2 + seed
                found.append(result(arm, 2.0**exponent, seed, valid=loss, test=2 * loss))
    assert compare(found, "lora")["s"]["cut"].differences == pytest.approx({0: -0.08, 1: -0.08})
    fine = compare(found, "lora", interpolate=True)["s"]
    assert fine["cut"].differences == pytest.approx({0: 0.0, 1: 0.0})
    assert (fine["lora"].rate, fine["cut"].rate) == (0.25, 0.5)
    assert (fine["lora"].bottom, fine["cut"].bottom) == pytest.approx((2**-1.75, 2**-1.15))
    assert fine["cut"].average("test") == pytest.approx(1.0)
    assert [fine["cut"].scores[seed].valid for seed in (0, 1)] == pytest.approx([0.0, 1.0])


def test_verdicts_pool_settings_in_percent_of_the_baseline() -> None:
    results = example() + [
        {**entry, "run_info": {"train_config": {**entry["run_info"]["train_config"], "setting": "t"}}}
        for entry in example()
        if entry["run_info"]["train_config"]["seed"] == 0
    ]
    verdict = verdicts(compare(results, "lora"), "lora")["mask"]
    # Setting s: (−0.25 − 0.75) / 2 of a mean of 2.5; setting t: −0.25 of 2.
    assert verdict.relative == pytest.approx((-20.0 - 12.5) / 2)
    assert (verdict.settings, verdict.better, verdict.pairs) == (2, 3, 3)
    assert verdict.p_value == verdict.adjusted == pytest.approx(0.25)
    assert verdict.time == pytest.approx(1.5)


def test_a_mechanism_is_compared_at_equal_rates_and_seeds() -> None:
    results = example()
    for entry in results:
        masked = entry["run_info"]["train_config"]["arm_name"] == "mask"
        entry["study_info"]["probes"][-1]["misalignment"] = [0.05 if masked else 0.1]
        entry["study_info"]["probes"][-1]["row_norm"] = {"output": [0.2] + [1.0] * 8 + [0.8]}
        entry["train_info"]["metrics"][-1]["held-out loss"] = 2.25 if masked else 2.5
    found = mechanisms(results, "lora")
    assert list(found) == ["lora", "mask"]
    # Rates 0.1 and 0.2 of two seeds; the rate that diverged has no pair.
    mask = found["mask"]
    assert (mask.pairs, mask.less_misaligned, mask.less_forgotten) == (4, (4, 4), (4, 4))
    assert (mask.misalignment, mask.forgetting, mask.walk) == pytest.approx((0.5, -0.25, 0.25))
    assert mask.worse == pytest.approx((-1.5 + 0.75 - 1.5 + 0.25) / 4)
    assert found["lora"].misalignment == 1.0


def test_seeds_that_not_all_rates_have_do_not_count_yet() -> None:
    results = [*example(), result("mask", 0.1, 2, valid=0.0, test=0.0)]
    assert set(compare(results, "lora")["s"]["mask"].scores) == {0, 1}


def curves(setting: str = "s", seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """LoRA's test loss is (x − 0.5)² + 3 and its forgetting x + 2 at x = log2 of the rate, minus 1.

    ``half`` is LoRA at half of its rate, so that it lies on LoRA's own curve, and ``gain`` is better by 0.1.
    """
    found = []
    for arm, shift, gain in (("lora", 0.0, 0.0), ("half", 0.25, 0.0), ("gain", 0.25, 0.1)):
        for rate in RATES:
            for seed in seeds:
                x = math.log2(rate) - 1 - shift
                loss = (x - 0.25) ** 2 + 3 - gain
                one = result(arm, rate, seed, valid=loss, test=loss, setting=setting)
                one["train_info"]["metrics"][-1]["held-out loss"] = x + 4
                one["run_info"]["experiment_name"] = f"{arm}/{rate}/{seed}"
                one["train_info"]["metrics"][-1] |= {"train time": 1800.0, "eval time": 1800.0}
                one["study_info"]["probes"][-1] |= {"misalignment": [2.0 + x, 3.0 + x], "share": [0.25, 0.5]}
                found.append(one)
    return found


def test_an_arm_on_the_baselines_own_curve_gains_nothing_at_equal_forgetting() -> None:
    results = curves()
    # At the one rate both chose, ``half`` forgets 0.25 less for a loss that is higher.
    table = compare(results, "lora")
    assert table["s"]["half"].differences == pytest.approx({0: 0.1875, 1: 0.1875})
    found = at_equal_forgetting(results, table, "lora")
    assert found["s", "half"] == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-5)
    assert found["s", "gain"] == pytest.approx({0: -0.1, 1: -0.1}, abs=1e-5)
    assert ("s", "lora") not in found


def test_nothing_is_said_of_forgetting_that_the_baseline_does_not_reach() -> None:
    results = curves()
    for one in results:
        if one["run_info"]["train_config"]["arm_name"] == "gain":
            one["train_info"]["metrics"][-1]["held-out loss"] -= 5.0
    found = at_equal_forgetting(results, compare(results, "lora"), "lora")
    assert set(found) == {("s", "half")}


def test_interpolation_also_places_forgetting_and_misalignment() -> None:
    fine = compare(curves(), "lora", interpolate=True)["s"]
    assert (fine["lora"].bottom, fine["half"].bottom) == pytest.approx((2.0**1.25, 2.0**1.5))
    for arm in ("lora", "half"):
        assert fine[arm].average("test") == pytest.approx(3.0)
        assert fine[arm].average("forgetting") == pytest.approx(2.25)
        assert fine[arm].average("misalignment") == pytest.approx(2.75)


def test_rates_of_a_wider_but_shorter_study_do_not_take_seeds_away() -> None:
    results = [*curves(seeds=(0, 1, 2, 3)), *(result("lora", 8.0, seed, 9.0, 9.0) for seed in (0, 1))]
    assert set(compare(results, "lora")["s"]["lora"].scores) == {0, 1, 2, 3}


SPECIFICATION: dict[str, Any] = {
    "studies": {"small": {"arms": ["lora", "half", "gain"], "seeds": [0, 1], "settings": [SETTING]}},
    "tables": {
        "pooled": {"kind": "pooled", "study": "small"},
        "settings": {"kind": "by_setting", "study": "small"},
        "pairs": {"kind": "pairs", "study": "small", "pairs": [["gain", "half"]]},
        "mechanism": {"kind": "mechanism", "study": "small"},
        "forgetting": {"kind": "equal_forgetting", "study": "small"},
        "one_rate": {
            "kind": "one_rate",
            "study": "small",
            "setting": SETTING,
            "rates": [2.0, 4.0, 8.0],
            "arms": ["half", "gain"],
        },
        "layers": {"kind": "layers", "study": "small"},
        "selection": {"kind": "selection", "study": "small"},
        "correlations": {"kind": "correlations", "study": "small"},
        "exact": {"kind": "exact", "study": "small", "settings": [SETTING]},
        "cost": {"kind": "cost", "studies": ["small", "small"]},
    },
}


def made(results: list[dict[str, Any]] | None = None) -> dict[str, EvidenceTable]:
    others = [result("lora", 1.0, 7, 1.0, 1.0, SETTING), result("other", 1.0, 0, 1.0, 1.0, SETTING)]
    sources = Sources([*(results or curves(SETTING)), *others], SPECIFICATION["studies"])
    return make_tables(sources, SPECIFICATION["tables"])


def test_every_kind_of_table() -> None:
    tables = made()
    assert tables["pooled"].rows[0] == ["gain", "1", "-3.33", "-3.33 … -3.33", "2/2", "0.500", "1.000", "1.00"]
    gain, half, base = tables["settings"].rows
    assert gain[1] == "-3.33 (-3.33 … -3.33) 2/2"
    assert half[1].startswith("+0.00 (")
    assert base == ["lora, nats", "3.0000 at 2.4, 2 seeds"]
    assert tables["pairs"].rows == [["gain against half", "1", "-3.33", "-3.33 … -3.33", "2/2", "0.500"]]
    assert [row[0] for row in tables["mechanism"].rows] == ["lora", "gain", "half"]
    assert tables["forgetting"].rows[0][:4] == ["gain", "1", "+0.000", "-3.33"]
    # x of LoRA is 0 and 1, that of the others 0.25 less.
    half, gain, base = tables["one_rate"].rows
    assert half == ["half", "+6.12 0/2", "-8.77 2/2", "–"]
    assert gain[1:] == ["+2.86 0/2", "-11.58 2/2", "–"]
    assert base == ["lora, nats", "3.0625", "3.5625", "–"]
    # LoRA's best rate of the grid is 2: x = 0.
    assert tables["layers"].rows == [[SETTING, "2.0000 (25 %)", "3.0000 (50 %)"]]
    # At its best rate of the grid, 2, ``half`` is at x = −0.25: (1.75 + 2.75) ÷ (2 + 3).
    assert tables["selection"].rows[:3] == [["lora", "1.00"], ["gain", "0.90"], ["half", "0.90"]]
    assert tables["correlations"].rows[0][:3] == [SETTING, "6", "+1.00"]
    assert tables["exact"] == EvidenceTable(["arm", SETTING], [[arm, "50.0"] for arm in ("lora", "gain", "half")])
    assert tables["cost"].rows == [["small", "3", "18", "18.00"], ["small", "3", "0", "0.00"]]


def test_arms_that_move_selection_further_for_a_lower_loss_are_correlated_by_minus_one() -> None:
    results = curves(SETTING)
    for one in results:
        arm = one["run_info"]["train_config"]["arm_name"]
        one["study_info"]["probes"][-1]["misalignment"] = [{"gain": 3.0, "lora": 2.0, "half": 1.0}[arm]]
        if arm == "half":
            one["train_info"]["metrics"][-1]["test loss"] += 0.5
    found = made(results)["selection"].rows
    assert found == [["lora", "1.00"], ["gain", "1.50"], ["half", "0.50"], ["correlation with test loss", "-1.00"]]


def test_a_page_holds_whole_tables_and_single_cells(tmp_path: Path) -> None:
    templates = tmp_path / "pages"
    templates.mkdir()
    (templates / "page.md").write_text('{{ pooled }}\n\nIt is {{ pooled.gain["test loss, % of baseline"] }} %.\n')
    (page,) = make_pages(made(), templates).items()
    table, rest = page[1].split("\n\n")
    assert page[0] == "page.md"
    assert table.splitlines()[2] == "| gain | 1 | -3.33 | -3.33 … -3.33 | 2/2 | 0.500 | 1.000 | 1.00 |"
    assert rest == "It is -3.33 %.\n"


def test_what_would_end_a_cell_is_escaped() -> None:
    head, line, row = str(EvidenceTable(["arm", "|Δρ|"], [["lora", "a|b"]])).splitlines()
    assert (head, line, row) == (r"| arm | \|Δρ\| |", "| --- | --- |", r"| lora | a\|b |")


@pytest.mark.parametrize("asked", ["absent", "absent.gain", "pooled.absent", "pooled.gain.absent"])
def test_what_no_table_has_is_refused(tmp_path: Path, asked: str) -> None:
    (tmp_path / "page.md").write_text(f"{{{{ {asked} }}}}")
    with pytest.raises(StudyError, match=r"page\.md asks for what no table of studies\.yaml has: .*'absent'"):
        make_pages(made(), tmp_path)


def test_the_pages_say_what_the_results_say() -> None:
    assert write_evidence(recorded().values(), check=True)
    answers = (DOCUMENTS / "evidence.md").read_text()
    assert len(answers.splitlines()) <= 80
    for page in (answers, (DOCUMENTS / "evidence_tables.md").read_text()):
        assert "<!--" not in page
        assert "{" not in page
