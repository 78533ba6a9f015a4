"""Statistics against scipy and numbers worked out by hand; reports from result files alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from study_helpers import result

from benchmarks.study import StudyError
from benchmarks.study.report.comparison import bootstrap_interval, compare, holm, sign_test, verdicts
from benchmarks.study.report.mechanism import mechanisms
from benchmarks.study.report.summary import make_report, markdown, sections


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


def test_the_best_interval_is_early_stopping() -> None:
    found = compare(example(), "lora", "best")["s"]
    assert found["lora"].average("test") == 0.75
    assert found["lora"].average("forgetting") == 0.25


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


def test_a_report_is_made_from_result_files_alone(tmp_path: Path) -> None:
    for index, entry in enumerate(example()):
        (tmp_path / f"{index}.json").write_text(json.dumps(entry))
    script = (
        "import sys; from pathlib import Path; import json\n"
        "from benchmarks.study.report.summary import make_report\n"
        f"results = [json.loads(f.read_text()) for f in sorted(Path({str(tmp_path)!r}).glob('*.json'))]\n"
        f"make_report(results, 'lora', 'last', Path({str(tmp_path / 'out')!r}), 'Example', False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3], timeout=60)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text == markdown(sections(example(), compare(example(), "lora"), "lora"), "lora", "Example")
    paired = "-0.5000 | -0.7500 … -0.2500 | 2/2 | 0.500"
    assert f"| mask | 0.2 | 2 | 1.4000 | 2.0000 | {paired} | 50.0 | +0.500 | 0.1000 | 1.50 | 1 | 7 |" in text
    assert "| lora | 0.1! | 2 |" in text


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = example()
    for entry in results:
        entry["study_info"]["probes"][-1]["row_norm"] = {"output": [0.1] * 10}
    make_report(results, "lora", "last", tmp_path, "Example", figures=True)
    assert {file.name for file in tmp_path.glob("*.svg")} == {"differences.svg", "rates.svg", "walk.svg"}


def test_a_report_without_the_baseline_is_refused() -> None:
    with pytest.raises(StudyError, match="no result of the baseline 'lora'"):
        make_report([result("mask", 0.1, 0, 1.0, 1.0)], "lora", "last", None, "", False)
