"""The digits example: what is asked of whom, stages that are whole or absent, and the whole of it on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from module_helpers import byte_tokenizer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

pytest.importorskip("sklearn", reason="the example's digits come from scikit-learn")

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "vlm_digits"


def load_script(name: str) -> ModuleType:
    # The scripts import each other by bare names, as Python finds them beside the one that it runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        return importlib.import_module(name)


settings_script = load_script("settings")
digits = load_script("digits")
caching = load_script("caching")
stages = load_script("stages")
picture = load_script("picture")
fine_tuning = load_script("fine_tuning")
run = load_script("run")


def say_nothing(line: str) -> None:
    pass


def tiny_settings(folder: Path) -> Any:
    """A byte-level Llama of two layers for a language model, and a few steps of everything."""
    language_model = folder / "language_model"
    tokenizer = byte_tokenizer(chat_template=None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(language_model)
    tokenizer.save_pretrained(language_model)
    return settings_script.Settings(
        language_model=language_model,
        cache=folder / "cache",
        runs=folder / "runs",
        train_questions=16,
        held_out_questions=8,
        hidden_size=16,
        layers=1,
        tower_epochs=1,
        alignment_steps=2,
        projector_steps=2,
        projector_batch_size=4,
        epochs=1,
        batch_size=8,
        rank=2,
        log_every=1,
    )


class TestQuestions:
    def test_answers_follow_from_the_labels(self) -> None:
        _, labels = digits.load_digits()
        train, _ = digits.split_images(len(labels))
        for question in digits.make_questions(labels.tolist(), train, 80, seed=3):
            shown = [int(labels[int(Path(name).stem)]) for name in question.images]
            expected = {
                "digit": str(shown[0]),
                "parity": "odd" if shown[0] % 2 else "even",
                "sum": str(sum(shown)),
                "larger": str(max(shown)),
            }[question.kind]
            assert question.completion == expected
            if question.kind == "larger":
                assert len(set(shown)) == 2

    def test_no_image_is_on_both_sides(self, tmp_path: Path) -> None:
        digits.write_data(tmp_path, 80, 40)
        sides = [
            {name for question in digits.read_questions(tmp_path / f"{side}.jsonl") for name in question.images}
            for side in ("train", "held_out")
        ]
        assert not sides[0] & sides[1]
        assert all((tmp_path / name).is_file() for name in sides[0] | sides[1])

    def test_kinds_are_equally_many_and_questions_differ(self) -> None:
        _, labels = digits.load_digits()
        _, held_out = digits.split_images(len(labels))
        questions = digits.make_questions(labels.tolist(), held_out, 200, seed=0)
        kinds = [question.kind for question in questions]
        assert {kind: kinds.count(kind) for kind in digits.KINDS} == dict.fromkeys(digits.KINDS, 50)
        assert len({(question.kind, *question.images) for question in questions}) == 200

    def test_more_questions_than_images_are_refused(self) -> None:
        with pytest.raises(settings_script.ExampleError, match="ask for fewer"):
            digits.make_questions([1, 2, 3], [0, 1, 2], 12, seed=0)


class TestStages:
    def test_a_stage_is_made_once_and_again_when_its_ingredients_change(self, tmp_path: Path) -> None:
        made = []

        def make(folder: Path) -> str:
            made.append(folder)
            (folder / f"file{len(made)}").touch()
            return "done"

        for key in ("a", "a", "b"):
            caching.stage(tmp_path / "stage", key, "Title", make, say_nothing)
        assert len(made) == 2
        assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["file2", "stage.json"]

    def test_a_failed_stage_leaves_the_former_one_alone(self, tmp_path: Path) -> None:
        def fail(folder: Path) -> str:
            raise KeyboardInterrupt

        caching.stage(tmp_path / "stage", "a", "Title", lambda folder: "done", say_nothing)
        with pytest.raises(KeyboardInterrupt):
            caching.stage(tmp_path / "stage", "b", "Title", fail, say_nothing)
        assert caching.is_made(tmp_path / "stage", "a")
        assert [path.name for path in tmp_path.iterdir()] == ["stage"]

    def test_only_stages_are_forgotten(self, tmp_path: Path) -> None:
        caching.forget(tmp_path)
        caching.forget(tmp_path / "absent")
        assert tmp_path.is_dir()

    def test_images_are_shifted_within_their_frame(self) -> None:
        image = torch.full((64, 3, 16, 16), -1.0)
        image[:, :, 8, 8] = 1.0
        shifted = stages._shifted(image, torch.Generator().manual_seed(0))
        places = {tuple(place.tolist()) for place in (shifted[:, 0] == 1).nonzero()[:, 1:]}
        assert places == {(row, column) for row in (6, 8, 10) for column in (6, 8, 10)}


class TestAnswers:
    def test_accuracy_is_by_kind_and_of_all(self) -> None:
        questions = [digits.Question("sum", [], "", "10"), digits.Question("digit", [], "", "1")]
        assert fine_tuning.accuracies(questions, [" 10", "7"]) == {"digit": 0.0, "sum": 1.0, "all": 0.5}

    def test_long_answers_are_shortened_in_the_picture(self) -> None:
        assert picture._shortened("\n\nabcdefghijkl") == "abcdef..."
        assert picture._shortened(" ") == "(nothing)"


class TestWholeExample:
    @pytest.fixture(scope="class")
    @staticmethod
    def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
        settings = tiny_settings(tmp_path_factory.mktemp("vlm_digits"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "ensure_language_model", lambda folder: None)
            assert run.main(["--method", "na"], settings) == 0
        return settings

    def test_model_is_an_ordinary_llava_folder(self, finished: Any) -> None:
        folder = finished.cache / "model"
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.dtype == torch.float32
        inputs = processor(text="<image><image>Sum?\n", images=[Image.new("RGB", (16, 16))] * 2, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * stages.IMAGE_TOKENS
        assert model(**inputs).logits.isfinite().all()

    def test_run_leaves_adapter_curves_answers_and_picture(self, finished: Any) -> None:
        folder = finished.runs / "na-seed0"
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["r"] == 2
        assert len(fine_tuning.read_answers(folder)) == 8
        with Image.open(finished.runs / "predictions.png") as image:
            assert image.width > 500

    def test_gates_of_every_part_are_watched(self, finished: Any) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(finished.runs / "na-seed0" / "curves"))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        for activation in ("silu", "quick_gelu"):
            assert {f"gates/responsiveness/{activation}", f"gates/step_scale/{activation}"} <= tags

    def test_second_run_finds_everything(self, finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "ensure_language_model", lambda folder: None)
            assert run.main([], finished) == 0
        assert capsys.readouterr().out.count("already there") == 5

    def test_changed_settings_repeat_the_stages_that_they_change(
        self, finished: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "ensure_language_model", lambda folder: None)
            assert run.main(["--method", "lora", "--learning-rate", "0.01"], replace(finished, keep_fraction=0.25)) == 0
        assert capsys.readouterr().out.count("already there") == 4
        assert (finished.runs / "lora-seed0-lr0.01" / "adapter" / "adapter_model.safetensors").is_file()


class TestCommandLine:
    def test_folder_without_model_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run.main(["--model-folder", str(tmp_path)]) == 2
        assert "config.json" in capsys.readouterr().err

    def test_language_model_that_cannot_be_got_is_an_error_of_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "broken").mkdir()
        settings = settings_script.Settings(language_model=tmp_path / "broken")
        assert run.main([], settings) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_fast_runs_keep_away_from_the_others(self) -> None:
        ordinary = settings_script.Settings()
        assert ordinary.fast().cache != ordinary.cache
        assert ordinary.fast().runs != ordinary.runs
