"""Cells: pairing by seed, controls that must equal plain LoRA, every method, and records that run again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml

from benchmarks.study import StudyError
from benchmarks.study.__main__ import main
from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import ArmHook, BuiltArm
from benchmarks.study.cells import PLAIN_READING, Arm, Cell, recorded
from benchmarks.study.report.evidence import SPECIFICATION
from benchmarks.study.run import training
from benchmarks.study.run.models import fresh_model
from benchmarks.study.run.reproduce import Reproduction, compare, reproduce
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ARMS: dict[str, Any] = {
    "lora": {},
    "mask": {"importance": {"warmup_steps": 1, "refresh_every": 1}},
    "keep_all": {"importance": {"keep_fraction": 1.0, "warmup_steps": 0}},
    "random": {"importance": {"control": "random", "warmup_steps": 0}},
    "equal_norm": {"importance": {"warmup_steps": 0}, "hook": "equal_norm"},
    "scale": {"step_scale": {"granularity": "channel", "normalize": True}},
    "no_gates": {"without_gates": True},
    "no_warmup": {"training": {"warmup_fraction": 0.0}},
    "rslora": {"peft": {"use_rslora": True}},
    "dora": {"peft": {"use_dora": True}},
    "pissa": {"peft": {"init_lora_weights": "pissa"}},
    "lora_plus": {"optimizer": "lora_plus"},
    "adalora": {"method": "adalora"},
    "lora_fa": {"optimizer": "lora_fa"},
}


TOKENS = torch.arange(2, 34).reshape(2, 16)
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}


def built(cell: Cell) -> BuiltArm:
    base = fresh_model(cell.setting.model)
    return build(base, cell.arm, cell.setting.lora, cell.training, cell.rate, cell.seed)


def matrices_a(arm: BuiltArm) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arm.model.named_parameters() if "lora_A" in name}


def test_arms_of_a_seed_start_from_the_same_a_and_see_the_same_batches(
    make_cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ["lora", "mask", "no_gates", "dora", "rslora", "lora_plus", "lora_fa"]
    cells = {name: make_cell(ARMS[name]) for name in arms}
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


def test_seeds_differ(make_cell: Any) -> None:
    first, second = (matrices_a(built(make_cell(seed=seed))) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_keep_fraction_one_is_bitwise_plain_lora_and_a_mask_is_not(make_cell: Any) -> None:
    ran = {name: training.run_cell(make_cell(ARMS[name])) for name in ("lora", "keep_all", "mask")}
    assert ran["keep_all"] == ran["lora"]
    assert ran["mask"]["metrics"] != ran["lora"]["metrics"]
    last = ran["lora"]["probes"][-1]
    assert len(last["misalignment"]) == 2
    assert min(last["misalignment"]) > 0
    assert len(last["walk"]["output"]) == len(last["row_norm"]["selection"]) == 10
    assert ran["lora"]["probes"][0]["misalignment"] == [0.0, 0.0]


def test_probes_leave_no_trace_in_training(make_cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell(ARMS["mask"])
    probed = training.run_cell(cell)
    monkeypatch.setattr(training.GateProbe, "measure", lambda self: {})
    assert training.run_cell(cell)["metrics"] == probed["metrics"]


def test_equal_norm_moves_all_rows_of_a_site_by_as_much_as_its_mask(make_cell: Any) -> None:
    steps = []
    for options in ({}, {"importance": {"warmup_steps": 0}}, ARMS["equal_norm"]):
        arm = built(make_cell(options))
        training._train_step(arm, BATCH, 1.0, 0)
        # B starts at zero, so that its rows are the step.
        steps.append([site.parameters()[0].parameter.detach() for site in arm.gates])
    for whole, masked, uniform in zip(*steps, strict=True):
        assert (masked == 0).all(dim=1).sum() == 12
        torch.testing.assert_close(uniform, whole * (masked.norm() / whole.norm()))


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_method_trains(make_cell: Any, name: str) -> None:
    ran = training.run_cell(make_cell(ARMS[name]))
    assert [entry["step"] for entry in ran["metrics"]] == [0, 3, 6]
    assert ran["metrics"][-1]["valid loss"] != ran["metrics"][0]["valid loss"]
    assert bool(ran["probes"][-1].get("misalignment")) == (name not in ("adalora", "no_gates"))


def test_adalora_is_called_every_step(make_cell: Any) -> None:
    arm = built(make_cell(ARMS["adalora"], steps=40, evaluate_every=40))
    called: list[int] = []
    allocate = arm.model.base_model.update_and_allocate
    arm.model.base_model.update_and_allocate = lambda step: called.append(step) or allocate(step)  # type: ignore[func-returns-value]
    for step in range(3):
        training._train_step(arm, BATCH, 1.0, step)
    assert called == [0, 1, 2]


def test_the_random_control_draws_other_masks_for_every_seed(make_cell: Any) -> None:
    weights = []
    for seed in (3, 4):
        cell = make_cell(ARMS["random"], seed=seed)
        arm = built(cell)
        training._train_step(arm, BATCH, 1.0, 0)
        assert arm.controller is not None
        weights.append(arm.controller.weights)
        assert cell.arm.options_of(seed)["importance"]["seed"] == seed
    assert weights[0].sum() == weights[1].sum() == 24
    assert not torch.equal(*weights)


class CountingHook(ArmHook):
    """A hook that a cell names by its path."""

    counted = 0

    def before_step(self, step: int) -> None:
        assert any(p.grad is not None for p in self.built.model.parameters())
        type(self).counted += 1


def test_a_hook_is_found_by_its_path(make_cell: Any) -> None:
    training.run_cell(make_cell({"hook": f"{__name__}:CountingHook"}))
    assert CountingHook.counted == 6


def record_of(cell: Cell) -> dict[str, Any]:
    """What a cell that ran was recorded as, in the parts that are read again."""
    ran = training.run_cell(cell)
    packages = {"torch-version": torch.__version__}
    return {
        "run_info": {"experiment_name": cell.name, "train_config": cell.config()},
        "train_info": {"metrics": [{**entry, "train time": 1.0} for entry in ran["metrics"]]},
        "meta_info": {
            "model_info": {"sha": ran["model_sha256"]},
            "dataset_info": {cell.setting.task: {"sha": ran["data_sha256"]}},
            "package_info": packages,
            "system_info": {"processor": "Another", "cpu_capability": "AVX9"},
        },
        "study_info": {"fingerprint": cell.fingerprint, "project_commit": "abc", "probes": ran["probes"]},
    }


def test_a_record_is_reproduced_bitwise_from_the_name_of_its_cell(make_cell: Any) -> None:
    cell = make_cell(ARMS["mask"])
    original = record_of(cell)
    assert reproduce(cell.name, {cell.name: original}).lines() == ["equal, bit by bit"]

    def changed(*path: Any, value: Any) -> Reproduction:
        saved = copy.deepcopy(original)
        place: Any = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return reproduce(cell.name, {cell.name: saved})

    place = ("train_info", "metrics", -1, "test loss")
    loss = original["train_info"]["metrics"][-1]["test loss"]
    rounded = changed(*place, value=loss * (1 + 1e-7))
    assert rounded.other_bits == (f"step 6: test loss was {loss * (1 + 1e-7)!r} and is {loss!r}",)
    assert rounded.other_results == ()
    (line,) = rounded.lines()
    assert line.startswith(
        "the same result to 4 digits, but not bit by bit (1 numbers): the result was made on Another"
    )
    other = changed(*place, value=loss * 1.01)
    assert other.other_results == (f"step 6: test loss was {loss * 1.01!r} and is {loss!r}",)
    assert other.lines()[-1].startswith("another result: the result was made on Another with AVX9")
    with pytest.raises(StudyError, match="base model is not the one"):
        changed("meta_info", "model_info", "sha", value="0")
    with pytest.raises(StudyError, match="text of the task is not the one"):
        changed("meta_info", "dataset_info", "digits", "sha", value="0")
    with pytest.raises(StudyError, match=r"defaults have changed since .* check out the commit abc"):
        changed("study_info", "fingerprint", value="0")


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


def test_recorded_cells_are_those_that_they_name_and_of_the_arms_in_the_file() -> None:
    records = recorded()
    assert len(records) == 2749
    arms = yaml.safe_load(SPECIFICATION.read_text())["arms"]
    plain = {name: Arm.from_options(name, options).plain() for name, options in arms.items()}
    for name, record in records.items():
        config = record["run_info"]["train_config"]
        cell = Cell.from_config(config)
        assert cell.name == name
        assert cell.config() == config
        assert cell.fingerprint == record["study_info"]["fingerprint"]
        assert config["arm"] == plain[config["arm_name"]]


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


def test_records_that_no_option_of_today_would_make_are_refused() -> None:
    with pytest.raises(StudyError, match=r"the arm 'a' has no option 'importence'; it takes hook, "):
        Arm.from_options("a", {"importence": {}})


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "s/lora/rate1-seed0"]) == 2
    message = "error: there is no record of a cell 's/lora/rate1-seed0'; names are SETTING/ARM/rateR-seedS.\n"
    assert capsys.readouterr().err == message
