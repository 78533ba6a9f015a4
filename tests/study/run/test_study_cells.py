"""Cells: pairing by seed, controls that must equal plain LoRA, every method through one harness, running again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from filelock import FileLock
from study_helpers import ARMS

from benchmarks.study import StudyError
from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import ArmHook, BuiltArm
from benchmarks.study.base_models import loading
from benchmarks.study.run import training
from benchmarks.study.run.reproduce import Reproduction, compare, decided, reproduce
from benchmarks.study.run.runner import extended, remaining, run_study
from benchmarks.study.run.specification import Cell, Study
from benchmarks.study.run.storage import Results, read

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def cells_of(study: Study) -> dict[str, Cell]:
    return {cell.arm.name: cell for cell in study.cells()}


def built(cell: Cell) -> BuiltArm:
    base = loading.fresh_model(cell.setting.model, "float32", torch.device("cpu"))
    return build(base, cell.arm, cell.setting.lora, cell.training, cell.rate, cell.seed)


def matrices_a(arm: BuiltArm) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arm.model.named_parameters() if "lora_A" in name}


def test_arms_of_a_seed_start_from_the_same_a_and_see_the_same_batches(
    make_study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ["lora", "mask", "no_gates", "dora", "rslora", "lora_plus", "lora_fa"]
    cells = cells_of(make_study(arms))
    reference = matrices_a(built(cells["lora"]))
    for name, cell in cells.items():
        own = matrices_a(built(cell))
        assert set(own) == {entry for entry in reference if name != "no_gates" or "gate_proj" not in entry}
        assert all(torch.equal(reference[entry], own[entry]) for entry in own)
    seen: dict[str, list[torch.Tensor]] = {}
    step = training._train_step
    for name in ("lora", "mask", "no_gates"):
        monkeypatch.setattr(
            training,
            "_train_step",
            lambda arm, batch, clip, number, name=name: (
                seen.setdefault(name, []).append(batch["input_ids"]) or step(arm, batch, clip, number)  # type: ignore[func-returns-value]
            ),
        )
        training.run_cell(cells[name])
    assert len(seen["lora"]) == 6
    for name in ("mask", "no_gates"):
        assert all(torch.equal(one, other) for one, other in zip(seen["lora"], seen[name], strict=True))


def test_seeds_differ(make_study: Any) -> None:
    one, other = make_study(["lora"], seeds=[0, 1]).cells()
    first, second = matrices_a(built(one)), matrices_a(built(other))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_keep_fraction_one_is_bitwise_plain_lora_and_a_mask_is_not(make_study: Any) -> None:
    cells = cells_of(make_study(["lora", "keep_all", "mask"]))
    ran = {name: training.run_cell(cell) for name, cell in cells.items()}
    assert decided(ran["keep_all"]["metrics"]) == decided(ran["lora"]["metrics"])
    assert ran["keep_all"]["probes"] == ran["lora"]["probes"]
    assert decided(ran["mask"]["metrics"]) != decided(ran["lora"]["metrics"])
    last = ran["lora"]["probes"][-1]
    assert len(last["misalignment"]) == 2
    assert min(last["misalignment"]) > 0
    assert len(last["walk"]["output"]) == len(last["row_norm"]["selection"]) == 10
    assert ran["lora"]["probes"][0]["misalignment"] == [0.0, 0.0]


def test_probes_leave_no_trace_in_training(make_study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cells_of(make_study(["mask"]))["mask"]
    probed = training.run_cell(cell)
    monkeypatch.setattr(training.GateProbe, "measure", lambda self: {})
    assert decided(training.run_cell(cell)["metrics"]) == decided(probed["metrics"])


def test_equal_norm_moves_all_rows_of_a_site_by_as_much_as_its_mask(make_study: Any) -> None:
    cells = cells_of(make_study(["lora", "mask", "equal_norm"]))
    arms = {name: built(cell) for name, cell in cells.items()}
    tokens = torch.arange(2, 34).reshape(2, 16)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    steps = {}
    for name, arm in arms.items():
        if name == "mask":  # as the control has it
            arm = build_with(cells["mask"], warmup_steps=0)
        training._train_step(arm, batch, 1.0, 0)
        # B starts at zero, so that its rows are the step.
        steps[name] = [site.parameters()[0].parameter.detach() for site in arm.gates]
    for whole, masked, uniform in zip(*steps.values(), strict=True):
        assert (masked == 0).all(dim=1).sum() == 12
        torch.testing.assert_close(uniform, whole * (masked.norm() / whole.norm()))


def build_with(cell: Cell, **importance: Any) -> BuiltArm:
    arm = type(cell.arm).from_options(cell.arm.name, {"importance": importance})
    return built(Cell(cell.setting, arm, cell.rate, cell.seed))


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_method_trains(make_study: Any, name: str) -> None:
    cell = next(make_study([name]).cells())
    ran = training.run_cell(cell)
    assert ran["status"] == "success"
    assert [entry["step"] for entry in ran["metrics"]] == [0, 3, 6]
    assert ran["metrics"][-1]["valid loss"] != ran["metrics"][0]["valid loss"]
    assert cell.rate == (0.005 if name == "pissa" else 0.01)
    assert bool(ran["probes"][-1].get("misalignment")) == (name not in ("adalora", "no_gates"))


def test_adalora_is_called_every_step(make_study: Any) -> None:
    cell = next(make_study(["adalora"], training={"steps": 40, "evaluate_every": 40}).cells())
    arm = built(cell)
    called: list[int] = []
    allocate = arm.model.base_model.update_and_allocate
    arm.model.base_model.update_and_allocate = lambda step: called.append(step) or allocate(step)  # type: ignore[func-returns-value]
    tokens = torch.arange(2, 34).reshape(2, 16)
    for step in range(3):
        training._train_step(
            arm, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}, 1.0, step
        )
    assert called == [0, 1, 2]


def test_the_random_control_draws_other_masks_for_every_seed(make_study: Any) -> None:
    study = make_study(["random"], seeds=[3, 4])
    weights = []
    for cell in study.cells():
        arm = built(cell)
        tokens = torch.arange(2, 34).reshape(2, 16)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        training._train_step(arm, batch, 1.0, 0)
        assert arm.controller is not None
        weights.append(arm.controller.weights)
        assert cell.arm.options_of(cell.seed)["importance"]["seed"] == cell.seed
    assert weights[0].sum() == weights[1].sum() == 24
    assert not torch.equal(*weights)


class CountingHook(ArmHook):
    """A hook that a study names by its path."""

    counted = 0

    def before_step(self, step: int) -> None:
        assert any(p.grad is not None for p in self.built.model.parameters())
        type(self).counted += 1


def test_a_hook_is_found_by_its_path(make_study: Any) -> None:
    study = make_study(["lora"])
    arm = type(study.arms[0]).from_options("candidate", {"hook": f"{__name__}:CountingHook"})
    training.run_cell(Cell(study.settings[0], arm, 0.01, 0))
    assert CountingHook.counted == 6


def test_a_study_resumes_cell_by_cell(make_study: Any, results: Results) -> None:
    study = make_study(["lora", "mask"], seeds=[0, 1])
    lines: list[str] = []
    assert run_study(study, results, minutes=0.0, log=lines.append) == 0
    first = len(list(results.cells.rglob("*.json")))
    assert 0 <= first < 4
    run_study(study, results, log=lines.append)
    stamps = {file: file.stat().st_mtime_ns for file in results.cells.rglob("*.json")}
    assert len(stamps) == 4
    assert remaining(study.cells(), results) == []
    next(iter(stamps)).unlink()
    run_study(study, results, log=lines.append)
    kept = [file for file, stamp in stamps.items() if file.stat().st_mtime_ns == stamp]
    assert len(kept) == 3


def test_a_cell_that_another_process_works_on_is_left_to_it(make_study: Any, results: Results) -> None:
    study = make_study(["lora"])
    file = results.path_of(next(study.cells()).name)
    file.parent.mkdir(parents=True)
    with FileLock(file.with_suffix(".lock")):
        run_study(study, results, log=lambda line: None)
    assert not file.exists()
    run_study(study, results, log=lambda line: None)
    assert file.exists()


def test_a_failing_arm_does_not_end_the_study(
    make_study: Any, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(["lora", "mask"])
    run = training.run_cell

    def fail(cell: Cell) -> dict[str, Any]:
        if cell.arm.name == "lora":
            raise RuntimeError("broken")
        return run(cell)

    monkeypatch.setattr("benchmarks.study.run.runner.run_cell", fail)
    assert run_study(study, results, log=lambda line: None) == 1
    assert [file.parent.name for file in results.cells.rglob("*.json")] == ["mask"]
    assert "broken" in next(results.cells.rglob("*.failed")).read_text()


def test_a_result_is_reproduced_bitwise_from_the_name_of_its_cell(make_study: Any, results: Results) -> None:
    study = make_study(["mask"])
    run_study(study, results, log=lambda line: None)
    name = next(study.cells()).name
    original = read(results.path_of(name))
    assert results.pack() == {"tiny.digits.r2-all-linear": 1}
    assert reproduce(name, results).lines() == ["equal, bit by bit"]

    def changed(factor: float, processor: str | None = None) -> Reproduction:
        saved = copy.deepcopy(original)
        saved["train_info"]["metrics"][-1]["test loss"] *= factor
        if processor:
            saved["meta_info"]["system_info"]["processor"] = processor
        results.write(saved)
        return reproduce(name, results)

    loss = original["train_info"]["metrics"][-1]["test loss"]
    step = original["train_info"]["metrics"][-1]["step"]
    for processor in (None, "Another"):
        rounded = changed(1 + 1e-7, processor)
        assert rounded.other_bits == (f"step {step}: test loss was {loss * (1 + 1e-7)!r} and is {loss!r}",)
        assert rounded.other_results == ()
        (line,) = rounded.lines()
        assert line.startswith("the same result to 5 digits, but not bit by bit (1 numbers): ")
        assert ("the result was made on Another with " in line) == (processor is not None)
        assert ("both ran on " in line) == (processor is None)
    other = changed(1.001, "Another")
    assert other.other_results == (f"step {step}: test loss was {loss * 1.001!r} and is {loss!r}",)
    assert other.lines()[-1].startswith("another result: the result was made on Another with ")
    original["meta_info"]["model_info"]["sha"] = "0"
    with pytest.raises(StudyError, match="base model is not the one"):
        changed(1.0)


def test_numbers_are_compared_wherever_they_stand() -> None:
    then = {"share": [0.5, {"walk": 1.0}], "gone": 1, "kept": None}
    now = {"share": [0.5 + 1e-9, {"walk": 1.5}], "new": 2, "kept": None}
    bits, results = compare(then, now, 1e-5, "probe ")
    assert bits == [
        "probe share 0 was 0.5 and is 0.500000001",
        "probe share 1 walk was 1.0 and is 1.5",
        "probe gone was 1 and is None",
        "probe new was None and is 2",
    ]
    assert results == bits[1:]


def test_a_result_has_the_keys_of_the_method_comparison(make_study: Any, results: Results) -> None:
    study = make_study(["mask"])
    cell = next(study.cells())
    run_study(study, results, log=lambda line: None)
    (result,) = results.all()
    assert set(result) == {"run_info", "train_info", "meta_info", "study_info"}
    assert {"created_at", "total_time", "experiment_name", "train_config", "peft_config", "error_msg"} <= set(
        result["run_info"]
    )
    assert {
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "train_time",
        "file_size",
        "num_trainable_params",
        "num_total_params",
        "status",
        "metrics",
    } == set(result["train_info"])
    assert {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"} == set(result["meta_info"])
    assert {"valid loss", "test loss", "test accuracy", "held-out loss", "train loss"} <= set(
        result["train_info"]["metrics"][-1]
    )
    assert Cell.from_config(result["run_info"]["train_config"]).fingerprint == cell.fingerprint


def test_grids_grow_where_the_best_rate_is_at_an_edge(make_study: Any, results: Results) -> None:
    study = make_study(["lora"], seeds=[0], rates=[0.001, 0.002])
    run_study(study, results, log=lambda line: None)
    rates = {cell.rate for cell in extended(study, results, 1)}
    assert rates == {0.004}
    run_study(study, results, extend=1, log=lambda line: None)
    assert {cell.rate for cell in extended(study, results, 1)} == set()


def test_changed_options_are_not_mixed_with_old_results(make_study: Any, results: Results) -> None:
    run_study(make_study(["lora"]), results, log=lambda line: None)
    changed = make_study(["lora"], settings=[{"model": "tiny", "task": "digits", "rank": 2, "alpha": 8}])
    with pytest.raises(StudyError, match="was made with other options"):
        remaining(changed.cells(), results)
