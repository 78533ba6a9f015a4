"""``na-lora compare``: what is compared, the cells in Optuna, and what the page says."""

from __future__ import annotations

import csv
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import seed_everything
from module_helpers import saved_model, write_records
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from na_lora_lightning.cli.compare import make_fit
from na_lora_lightning.cli.main import main
from na_lora_lightning.compare.cells import CellScorer
from na_lora_lightning.compare.grid import ScoredCell, extensions
from na_lora_lightning.compare.opening import open_storage
from na_lora_lightning.compare.page import as_csv, as_html, as_markdown
from na_lora_lightning.compare.plan import ARMS, Cell, Plan, merged, nested, read_configs, read_named
from na_lora_lightning.compare.results import common_tables, headline, tuned_table
from na_lora_lightning.compare.storage import Comparison
from na_lora_lightning.errors import ConfigurationError, DataError


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": {"model": {"model_name_or_path": "base"}},
        "tasks": {"one": {}},
        "arms": {"lora": ARMS["lora"], "better": {}, "worse": {}},
        "rates": (0.1, 0.2),
        "seeds": 2,
        "extend": 0,
    }
    return Plan(**{**values, **changes})


def made_up(cell: Cell) -> dict[str, Any]:
    """A valley over rates whose floor is at 0.2, 1 % lower for one arm and 2 % higher for another."""
    level = {"lora": 1.0, "better": 0.99, "worse": 1.02}[cell.arm]
    noise = 0.0005 * ((5 * cell.seed + len(cell.task)) % 7 - 3) * (1 if cell.arm == "lora" else 0.9)
    loss = level * (1 + 0.1 * math.log2(cell.rate / 0.2) ** 2) + noise
    return {
        "validation": loss,
        "test": loss,
        "test_sums": [loss, 2 * loss],
        "test_tokens": [1, 2],
        "other_loss": 3.0,
        "base_other_loss": 2.9,
        "other_kl": 0.1,
        "seconds": 1.0,
        "peak_memory": None,
        "steps": 5,
        "parameters": 10,
        "device": "cpu",
        "gates": {},
    }


def silent(line: str) -> None:
    """Says nothing."""


def begun(folder: Path, given: Plan, **heartbeat: int) -> Comparison:
    return Comparison.begin(open_storage(f"sqlite:///{folder}/comparison.db", **heartbeat), "test", given)


def texts(comparison: Comparison) -> tuple[str, ...]:
    scored = comparison.scored()
    return (
        as_html("t", scored, comparison.plan, 0.5),
        as_markdown("t", scored, comparison.plan, 0.5),
        as_csv(scored),
    )


# ---- what is compared ----


def test_options_lie_over_one_another_by_their_addresses() -> None:
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}
    assert merged({"a": {"b": 1, "c": 2}}, {"a.c": 3}, {"a": False}, {"a.d": 4}) == {"a": {"d": 4}}
    optimizer = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1, "betas": 2}}}
    assert merged(optimizer, {"optimizer.init_args.lr": 3})["optimizer"]["init_args"] == {"lr": 3, "betas": 2}
    other = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 5}}}
    assert merged(optimizer, other) == other


def test_a_cell_differs_by_arm_rate_and_seed_alone() -> None:
    given = plan(arms={**ARMS, "own": {"model.lora.r": 3}})
    configs = {arm: given.config(Cell("one", arm, 0.2, 7)) for arm in given.arms}
    for config in configs.values():
        assert (config["seed_everything"], config["data"]["seed"]) == (7, 7)
        assert config["model"]["optimizer"]["init_args"]["lr"] == 0.2
    assert configs["lora"]["gate_importance"] is False
    assert configs["random_mask"]["gate_importance"] == {"variant": {"control": "random", "seed": 7}}
    assert configs["own"]["model"].pop("lora") == {"r": 3}
    assert configs["own"] == configs["na_lora"]
    own_data = plan(base={"data": {"class_path": "x.Y"}}).config(Cell("one", "lora", 0.1, 4))
    assert own_data["data"] == {"class_path": "x.Y", "init_args": {"seed": 4}}
    assert len(given.cells()) == len(given.arms) * 2 * 2
    assert [cell.seed for cell in given.cells()] == sorted(cell.seed for cell in given.cells())


def test_arms_come_by_name_and_from_files(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("half: {gate_importance.keep_fraction: 0.5}\nplain:\n")
    found = read_named(f"lora, {file}", ARMS, "--arms")
    assert found == {"lora": ARMS["lora"], "half": {"gate_importance.keep_fraction": 0.5}, "plain": {}}
    assert list(read_named(f"{file}:plain", ARMS, "--arms")) == ["plain"]
    for given, part in (
        ("lorra", "'lorra', which is not known; use one of lora,"),
        (f"{file}:third", "has no 'third'"),
    ):
        with pytest.raises(ConfigurationError, match=part):
            read_named(given, ARMS, "--arms")


# ---- cells in Optuna ----


def test_each_cell_is_scored_once_and_the_page_is_the_same_twice(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan())
    asked: list[Cell] = []
    assert comparison.work(lambda cell: asked.append(cell) or made_up(cell), say=silent)  # type: ignore[func-returns-value]
    assert asked == plan().cells()
    assert comparison.count() == {"done": 12, "running": 0, "waiting": 0, "failed": 0, "left out": 0}
    again = Comparison.there(open_storage(f"sqlite:///{tmp_path}/comparison.db"), "test")
    assert texts(again) == texts(comparison)
    assert again.work(lambda cell: pytest.fail("scored again"), say=silent)


def test_two_workers_end_with_the_page_of_one(tmp_path: Path) -> None:
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    alone = begun(tmp_path / "alone", plan())
    alone.work(made_up, say=silent)
    done: list[list[Cell]] = [[], []]
    both = threading.Barrier(2, timeout=60)

    def work(own: list[Cell]) -> None:
        def score(cell: Cell) -> dict[str, Any]:
            if not own:
                both.wait()
            own.append(cell)
            return made_up(cell)

        begun(tmp_path / "together", plan()).work(score, say=silent)

    workers = [threading.Thread(target=work, args=(own,)) for own in done]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(done)
    assert {*done[0], *done[1]} == {*plan().cells()}
    assert texts(begun(tmp_path / "together", plan())) == texts(alone)


_DOOMED = """
import os, sys, time
sys.path[:0] = {paths!r}
from test_comparison import begun, plan, Path
def score(cell):
    print("begun", flush=True)
    time.sleep(60)
begun(Path({folder!r}), plan(), heartbeat=1, grace=2).work(score)
"""


def test_the_cell_of_a_killed_worker_is_trained_by_another(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = _DOOMED.format(paths=paths, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        worker.send_signal(signal.SIGKILL)
    comparison = begun(tmp_path, plan(), heartbeat=1, grace=2)
    assert comparison.count()["running"] == 1
    assert comparison.work(made_up, say=silent)
    assert len(comparison.scored()) == 12


def test_a_journal_without_heartbeats_takes_cells_again_when_asked(tmp_path: Path) -> None:
    comparison = Comparison.begin(open_storage(f"journal://{tmp_path}/journal.log"), "test", plan())
    comparison.study.ask()
    assert not comparison.work(made_up, say=silent)
    assert comparison.count()["running"] == 1
    assert comparison.retake() == 1
    assert comparison.work(made_up, say=silent)
    assert len(comparison.scored()) == 12


def test_time_ends_a_worker_between_cells(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan())
    assert not comparison.work(made_up, seconds=0.0, say=silent)
    assert comparison.count()["waiting"] == 12


def test_a_grid_grows_where_the_best_rate_is_at_its_edge(tmp_path: Path) -> None:
    given = plan(rates=(0.4, 0.8), extend=2, seeds=1)
    comparison = begun(tmp_path, given)
    assert comparison.work(made_up, say=silent)
    rates = {entry.cell.rate for entry in comparison.scored()}
    # 0.2 is the floor, and 0.1 shows that it is.
    assert rates == {0.1, 0.2, 0.4, 0.8}
    assert set(tuned_table(comparison.scored(), given, 0.5).baseline_rates.values()) == {0.2}
    own = [entry for entry in comparison.scored() if entry.cell.arm == "lora"]
    assert extensions(own, given) == [0.1, 0.2]
    assert extensions(own[:1], plan(rates=(0.1, 0.4)), is_over=False) == []


def test_rates_are_left_out_and_arms_are_not(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan(rates=(0.05, 0.1, 0.2), prune=20.0))
    assert comparison.work(made_up, say=silent)
    seeds = {rate: {e.cell.seed for e in comparison.scored() if e.cell.rate == rate} for rate in (0.05, 0.1, 0.2)}
    assert seeds == {0.05: {0}, 0.1: {0, 1}, 0.2: {0, 1}}
    assert {entry.cell.arm for entry in comparison.scored()} == {"lora", "better", "worse"}


def test_a_cell_that_fails_is_tried_again_and_then_left(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan(seeds=1))
    tries: list[Cell] = []

    def score(cell: Cell) -> dict[str, Any]:
        if cell == Cell("one", "better", 0.2, 0):
            tries.append(cell)
            raise RuntimeError("out of memory")
        return made_up(cell)

    assert comparison.work(score, say=silent)
    assert len(tries) == 3
    assert comparison.count() == {"done": 5, "running": 0, "waiting": 0, "failed": 1, "left out": 0}


def test_an_arm_that_cannot_be_trained_does_not_keep_the_others(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan())
    tries: list[Cell] = []

    def score(cell: Cell) -> dict[str, Any]:
        if cell.arm == "worse":
            tries.append(cell)
            raise DataError("record 3 is empty")
        return made_up(cell)

    assert comparison.work(score, say=silent)
    assert comparison.failures() == {("one", "worse"): "record 3 is empty"}
    assert len(tries) == 3
    assert {entry.cell.arm for entry in comparison.scored()} == {"lora", "better"}
    assert len(comparison.scored()) == 8


def test_a_worker_that_can_score_nothing_stops_and_its_cells_come_back(tmp_path: Path) -> None:
    def fail(cell: Cell) -> dict[str, Any]:
        raise RuntimeError("no such device")

    with pytest.raises(ConfigurationError, match=r"4 cells .* \(no such device\); correct that"):
        begun(tmp_path, plan()).work(fail, say=silent)
    comparison = begun(tmp_path, plan())
    assert comparison.work(made_up, say=silent)
    assert comparison.count() == {"done": 12, "running": 0, "waiting": 0, "failed": 0, "left out": 0}


def test_a_trial_that_two_workers_were_given_ends_neither(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan())
    scored: list[Cell] = []

    def score(cell: Cell) -> dict[str, Any]:
        if len(scored) == 2:
            (running,) = comparison.study.get_trials(states=[TrialState.RUNNING])
            comparison.study.tell(running.number, state=TrialState.FAIL)
        scored.append(cell)
        return made_up(cell)

    assert comparison.work(score, say=silent)
    assert (len(scored), len(set(scored))) == (13, 12)
    assert comparison.count()["done"] == 12


def test_another_comparison_is_not_joined(tmp_path: Path) -> None:
    begun(tmp_path, plan()).work(made_up, say=silent)
    for changes, part in (
        ({"base": {"model": {"model_name_or_path": "other"}}}, "the configuration"),
        ({"arms": {"lora": {}, "better": {}}}, "the arm 'lora'"),
        ({"tasks": {"one": {"data.max_length": 3}}}, "the task 'one'"),
    ):
        with pytest.raises(ConfigurationError, match=f"was begun with another value of {part}"):
            begun(tmp_path, plan(**changes))
    # More of the same is welcome, also on another device.
    base = {"model": {"model_name_or_path": "base"}, "trainer": {"accelerator": "gpu"}}
    joined = begun(tmp_path, plan(base=base, arms={"lora": ARMS["lora"], "third": {}}, seeds=3))
    assert (list(joined.plan.arms), joined.plan.seeds) == (["lora", "better", "worse", "third"], 3)
    with pytest.raises(ConfigurationError, match="there is no comparison 'none'"):
        Comparison.there(open_storage(f"sqlite:///{tmp_path}/comparison.db"), "none")


# ---- what the page says ----


def test_the_tables_say_what_was_put_in(tmp_path: Path) -> None:
    comparison = begun(tmp_path, plan(tasks={"one": {}, "more": {}}, seeds=3))
    comparison.work(made_up, say=silent)
    scored, given = comparison.scored(), comparison.plan
    table = tuned_table(scored, given, 0.5)
    assert [(row.arm, row.verdict) for row in table.rows] == [("better", "better"), ("worse", "worse")]
    assert table.rows[0].estimate.mean == pytest.approx(-1.0, abs=0.05)
    assert table.rows[1].estimate.mean == pytest.approx(2.0, abs=0.05)
    assert (table.rows[0].estimate.negative, table.rows[0].estimate.pairs) == (6, 6)
    # Two arms are tested: twice 2 · 2⁻⁶.
    assert table.rows[0].adjusted == pytest.approx(2 * 2 / 2**6)
    assert [each.rate for each in common_tables(scored, given, 0.5)] == [0.1, 0.2]
    sentence = headline(table, given, 0.5)
    assert sentence.startswith("At tuned rates better is better than lora; worse is worse than lora: with 6 pairs on 2")
    assert f"no difference below {table.detectable:.2g} % can be told" in sentence
    assert sentence in as_markdown("t", scored, given, 0.5)


def test_a_task_whose_seeds_differ_does_not_hide_the_others() -> None:
    def scored(task: str, arm: str, seed: int) -> ScoredCell:
        change = {("quiet", "better"): 0.99, ("noisy", "better"): 0.5 + seed / 2}.get((task, arm), 1.0)
        test = change * (1 + 1e-4 * seed * (arm == "better"))
        return ScoredCell(Cell(task, arm, 0.1, seed), test, made_up(Cell(task, "lora", 0.1, seed)) | {"test": test})

    arms: dict[str, dict[str, Any]] = {"lora": {}, "better": {}}
    given = plan(tasks={"quiet": {}, "noisy": {}}, arms=arms, rates=(0.1,), seeds=3)
    cells = [scored(task, arm, seed) for task in given.tasks for arm in arms for seed in range(3)]
    table = tuned_table(cells, given, 0.5)
    assert [row.verdict for row in table.rows] == ["open"]
    # The noisy one's differences are -50, 0 and 50 %, the quiet one's -1.00, -0.99 and -0.98.
    assert table.rows[0].by_task["quiet"].mean == pytest.approx(-0.99, abs=1e-3)
    last = "On single tasks, after Holm's adjustment for all 2: better is better on quiet."
    assert headline(table, given, 0.5).endswith(last)


def test_a_name_is_shown_as_text(tmp_path: Path) -> None:
    arms = {"lora": ARMS["lora"], "<b>|x": {}}
    comparison = begun(tmp_path, plan(arms=arms, seeds=2))
    comparison.work(lambda cell: made_up(Cell(cell.task, "lora", cell.rate, cell.seed)), say=silent)
    html, markdown, _ = texts(comparison)
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "\\|x" in markdown


# ---- fits ----


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    records = write_records(folder / "records.jsonl", 12)
    options = {
        "model": {"model_name_or_path": saved_model(folder / "base"), "lora": {"r": 2, "alpha": 4}},
        "data": {"train": records, "validation": records, "batch_size": 4},
        "gate_importance": {"warmup_steps": 1, "refresh_every": 1},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


def test_a_comparison_from_the_command_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = workplace / "out"
    given = ["compare", "--config", str(workplace / "config.yaml"), "--rates", "1e-2,3e-2", "--seeds", "2"]
    given += ["--extend", "0", "--output", str(output)]
    assert main(given) == 0
    assert "Cells 8 done" in capsys.readouterr().out
    page = (output / "page.html").read_bytes()
    assert main(["compare", "--show", "--output", str(output)]) == 0
    assert (output / "page.html").read_bytes() == page
    assert len(list(csv.DictReader((output / "cells.csv").read_text().splitlines()))) == 8
    assert not (workplace / "run").exists()
    # What 'na-lora fit' would have trained, on the records of validation that are not for the test.
    comparison = Comparison.there(open_storage(f"sqlite:///{output}/comparison.db"), "comparison")
    cell = Cell("task", "na_lora", 0.03, 1)
    seed_everything(5, verbose=False)
    fit = make_fit(merged(comparison.plan.config(cell), {"trainer.limit_val_batches": 1.0}))
    fit.trainer.fit(fit.module, datamodule=fit.datamodule)
    whole = float(fit.trainer.callback_metrics["validation/loss"])
    scored = next(entry for entry in comparison.scored() if entry.cell == cell)
    test_tokens = sum(scored.result["test_tokens"])
    tokens = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in fit.datamodule.val_dataloader())
    mean = (scored.validation * (tokens - test_tokens) + scored.result["test"] * test_tokens) / tokens
    assert mean == pytest.approx(whole, rel=1e-5)
    assert min(scored.result["other_kl"], scored.result["own_kl"]) > 0
    assert 0 < scored.result["gates"]["gate_mask_density"] < 1


# The parser's own, which the command line silences.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_last_blocks_train_on_kept_inputs_as_without_them(workplace: Path, tmp_path: Path) -> None:
    base = read_configs([str(workplace / "config.yaml")])
    given = Plan(base, {"task": {}}, {"lora": ARMS["lora"], "na_lora": {}}, (0.03,), seeds=1, last_layers=1)
    scorer = CellScorer(given, make_fit, tmp_path)
    for arm in given.arms:
        cell = Cell("task", arm, 0.03, 0)
        first, again = scorer.score(cell), scorer.score(cell)
        fit = make_fit(merged(given.config(cell), {"trainer.limit_val_batches": 1.0}))
        fit.trainer.fit(fit.module, datamodule=fit.datamodule)
        whole = float(fit.trainer.callback_metrics["validation/loss"])
        for result in (first, again):
            sums, tokens = sum(result["test_sums"]), sum(result["test_tokens"])
            every = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in fit.datamodule.val_dataloader())
            mean = (result["validation"] * (every - tokens) + sums) / every
            assert mean == pytest.approx(whole, rel=1e-5)
    # A file for each record and each passage of other text.
    kept = len(list(tmp_path.rglob("*.safetensors")))
    assert kept >= 12
    scorer.score(Cell("task", "lora", 0.03, 1))
    assert len(list(tmp_path.rglob("*.safetensors"))) == kept
    # They are what the last block is given.
    before = scorer.score(Cell("task", "lora", 0.03, 0))["validation"]
    for file in tmp_path.rglob("*.safetensors"):
        save_file({"inputs": -load_file(file)["inputs"]}, file)
    assert abs(scorer.score(Cell("task", "lora", 0.03, 0))["validation"] - before) > 1e-4
    deep = Plan(base, {"task": {}}, given.arms, (0.03,), seeds=1, last_layers=2)
    with pytest.raises(ConfigurationError, match="has 2 blocks, so that the inputs of the last 2 cannot be kept"):
        CellScorer(deep, make_fit, tmp_path).score(Cell("task", "lora", 0.03, 0))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--arms", "lora"], "a comparison needs two arms"),
        (["--arms", "lora,lorra"], "'lorra', which is not known"),
        (["--rates", "fast"], "--rates is 'fast'"),
        (["--rates", "-1"], "--rates needs positive"),
        (["--model.lora.rank", "3"], "the arm 'lora' on 'task' cannot be trained"),
        (["--storage", "nosuch://x"], "the storage 'nosuch://x' cannot be opened"),
        (["--other-text", "nowhere.txt"], "the text 'nowhere.txt' cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    given = ["compare", "--config", str(workplace / "config.yaml"), "--output", str(tmp_path / "o"), *arguments]
    assert main(given) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert part in errors[0]
