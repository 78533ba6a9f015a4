"""The pages of evidence: tables and numbers made from results, the trade of fit against forgetting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_helpers import result

from benchmarks.study import StudyError
from benchmarks.study.arms.arm import PLAIN_READING, Arm
from benchmarks.study.report.comparison import compare
from benchmarks.study.report.evidence import DOCUMENTS, EvidenceTable, make_pages, make_tables, write_evidence
from benchmarks.study.report.evidence_tables import Sources
from benchmarks.study.report.mechanism import at_equal_forgetting
from benchmarks.study.run.specification import Cell
from benchmarks.study.run.storage import Results
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions

RATES = (1.0, 2.0, 4.0)
SETTING = "llama-silu.functions.r4-all-linear"


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


@pytest.fixture
def specification(tmp_path: Path) -> Path:
    """A specification beside a study."""
    studies = tmp_path
    shipped = Path(__file__).parents[3] / "benchmarks" / "study"
    (studies / "tasks.yaml").write_text((shipped / "studies" / "tasks.yaml").read_text())
    (studies / "arms.yaml").write_text("lora: {}\nhalf: {}\ngain: {}\n")
    study = {
        "role": "screening",
        "models": {"llama-silu": "folder"},
        "arms": ["lora", "half", "gain"],
        "seeds": [0, 1],
        "settings": [{"model": "llama-silu", "task": "functions", "rank": 4, "rates": list(RATES)}],
    }
    (studies / "small.yaml").write_text(yaml.safe_dump(study))
    tables = {
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
    }
    (studies / "evidence.yaml").write_text(yaml.safe_dump({"tables": tables}))
    return studies / "evidence.yaml"


def made(specification: Path, results: list[dict[str, Any]] | None = None) -> dict[str, EvidenceTable]:
    return make_tables(Sources(results or curves(SETTING), specification.parent), specification)


def test_every_kind_of_table(specification: Path) -> None:
    tables = made(specification)
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


def test_arms_that_move_selection_further_for_a_lower_loss_are_correlated_by_minus_one(
    specification: Path,
) -> None:
    results = curves(SETTING)
    for one in results:
        arm = one["run_info"]["train_config"]["arm_name"]
        one["study_info"]["probes"][-1]["misalignment"] = [{"gain": 3.0, "lora": 2.0, "half": 1.0}[arm]]
        if arm == "half":
            one["train_info"]["metrics"][-1]["test loss"] += 0.5
    found = made(specification, results)["selection"].rows
    assert found == [["lora", "1.00"], ["gain", "1.50"], ["half", "0.50"], ["correlation with test loss", "-1.00"]]


def test_a_page_holds_whole_tables_and_single_cells(specification: Path, tmp_path: Path) -> None:
    templates = tmp_path / "pages"
    templates.mkdir()
    (templates / "page.md").write_text('{{ pooled }}\n\nIt is {{ pooled.gain["test loss, % of baseline"] }} %.\n')
    (page,) = make_pages(made(specification), templates).items()
    table, rest = page[1].split("\n\n")
    assert page[0] == "page.md"
    assert table.splitlines()[2] == "| gain | 1 | -3.33 | -3.33 … -3.33 | 2/2 | 0.500 | 1.000 | 1.00 |"
    assert rest == "It is -3.33 %.\n"


def test_what_would_end_a_cell_is_escaped() -> None:
    head, line, row = str(EvidenceTable(["arm", "|Δρ|"], [["lora", "a|b"]])).splitlines()
    assert (head, line, row) == (r"| arm | \|Δρ\| |", "| --- | --- |", r"| lora | a\|b |")


@pytest.mark.parametrize("asked", ["absent", "absent.gain", "pooled.absent", "pooled.gain.absent"])
def test_what_no_table_has_is_refused(specification: Path, tmp_path: Path, asked: str) -> None:
    (tmp_path / "page.md").write_text(f"{{{{ {asked} }}}}")
    with pytest.raises(StudyError, match=r"page\.md asks for what no table of evidence\.yaml has: .*'absent'"):
        make_pages(made(specification), tmp_path)


def test_a_kind_of_table_that_does_not_exist_is_refused(specification: Path) -> None:
    specification.write_text("tables: {a: {kind: chart}}")
    with pytest.raises(StudyError, match="the unknown kind 'chart'; choose one of pooled"):
        made(specification)


def test_the_plain_reading_does_not_follow_the_packages_defaults() -> None:
    mask = Arm.from_options("mask", {"importance": {}, "step_scale": {}}).resolved
    assert set(PLAIN_READING["importance"].items()) <= set(mask["importance"].items())
    assert set(PLAIN_READING["step_scale"].items()) <= set(mask["step_scale"].items())
    assert mask["importance"]["keep_fraction"] == 0.5
    assert mask["importance"]["criterion"] == "selection_derivative"
    # A result that was made before the package had an option is still the result of its cell.
    assert mask["step_scale"]["matrix_a_factor"] == 1.0
    assert "matrix_a_factor" not in Arm.from_options("mask", {"step_scale": {}}).decisive["step_scale"]
    slow = Arm.from_options("slow", {"step_scale": {"matrix_a_factor": 0.5}})
    assert slow.decisive["step_scale"]["matrix_a_factor"] == 0.5
    assert ImportanceOptions(**mask["importance"])
    assert StepScaleOptions(**mask["step_scale"])


def test_committed_results_are_of_the_cells_that_they_name() -> None:
    results = Results().all_packed()
    assert len(results) == 2749
    for one in results:
        cell = Cell.from_config(one["run_info"]["train_config"])
        assert cell.fingerprint == one["study_info"]["fingerprint"]
        assert cell.name == one["run_info"]["experiment_name"]


def test_the_pages_say_what_the_results_say() -> None:
    assert write_evidence(Results().all_packed(), check=True)
    answers = (DOCUMENTS / "evidence.md").read_text()
    assert len(answers.splitlines()) <= 80
    for page in (answers, (DOCUMENTS / "evidence_tables.md").read_text()):
        assert "<!--" not in page
        assert "{" not in page
