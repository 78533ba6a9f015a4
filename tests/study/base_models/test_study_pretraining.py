"""The small models: what is saved is what was scored, and the cells load it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.study.base_models import catalogue, language, loading, vision
from benchmarks.study.errors import StudyError
from benchmarks.study.tasks import corpus


@pytest.mark.parametrize("name", ["llama-gelu", "gpt2-gelu"])
def test_a_pretrained_model_is_loaded_as_it_was_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Returns the {word} of an array, element by element." for word in ("sum", "mean", "root", "power")]
    monkeypatch.setattr(corpus, "pretraining_text", lambda: (tuple(texts), tuple(texts[:2])))
    scored: list[PreTrainedModel] = []
    mean_loss = language.mean_loss
    monkeypatch.setattr(language, "mean_loss", lambda model, windows: scored.append(model) or mean_loss(model, windows))  # type: ignore[func-returns-value]
    record = language.pretrain(name, tmp_path, steps=2, batch_size=2, length=8)
    assert loading.read_record(tmp_path / name) == record
    folder = str(tmp_path / name)
    model = loading.fresh_model(folder, "float32", torch.device("cpu"))
    assert language.weights_digest(model) == record["weights_sha256"]
    # What was scored is what is read, to the rotary frequencies that no file holds.
    of_record, read = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (scored[0], model))
    assert of_record.keys() == read.keys()
    assert all(torch.equal(value, read[key]) for key, value in of_record.items())
    # Another copy lies elsewhere in memory, where a kernel may add in another order.
    windows = torch.load(tmp_path / name / "held_out.pt")
    assert mean_loss(model, windows) == pytest.approx(record["held_out_loss"], rel=1e-6)
    _, tokenizer, digest = loading.base_model(folder, "float32")
    assert digest == record["weights_sha256"]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    # A cell's changes must not reach the next cell's model.
    with torch.no_grad():
        next(model.parameters()).zero_()
    again = loading.fresh_model(folder, "float32", torch.device("cpu"))
    assert language.weights_digest(again) == record["weights_sha256"]


def test_a_shipped_model_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "pretraining.json").write_text('{"name": "llama-silu"}')
    shutil.make_archive(str(tmp_path / "shipped" / "llama-silu"), "zip", tmp_path / "made")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(language, "pretrain", lambda *args, **kwargs: pytest.fail("pretrained"))
    catalogue.pretrain_missing(["llama-silu"], tmp_path / "models")
    catalogue.pretrain_missing(["llama-silu"], tmp_path / "models")
    assert loading.read_record(tmp_path / "models" / "llama-silu") == {"name": "llama-silu"}


def test_a_cell_takes_a_shipped_model_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = loading.fresh_model(str(loading.FOLDER / "llama-silu"), "float32", torch.device("cpu"))
    record = loading.read_record(loading.FOLDER / "llama-silu")
    assert language.weights_digest(model) == record["weights_sha256"]
    assert [place.name for place in loading.FOLDER.iterdir()] == ["llama-silu"]
    with pytest.raises(StudyError, match="there is no model in"):
        loading.fresh_model(str(Path("elsewhere") / "llama-silu"), "float32", torch.device("cpu"))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no model in"):
        loading.fresh_model(str(tmp_path), "float32", torch.device("cpu"))
    with pytest.raises(StudyError, match="holds no pretrained model"):
        loading.read_record(tmp_path)


def test_a_model_that_sees_is_made_after_its_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(language, "pretrain", lambda name, folder, steps: made.append(name))
    monkeypatch.setattr(vision, "pretrain", lambda name, folder: made.append(name))
    catalogue.pretrain_missing(["llava-silu"], tmp_path / "models", steps=1)
    assert made == ["llama-silu", "llava-silu"]
    with pytest.raises(StudyError, match=r"no recipe for a model 'llava'; choose one of .*, llava-silu"):
        catalogue.pretrain_missing(["llava"], tmp_path / "models")
