"""Tasks, specifications and base models: what a seed decides, what is refused, and that what is saved was scored."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from benchmarks.study import StudyError
from benchmarks.study.base_models import catalogue, language, loading, vision
from benchmarks.study.base_models.language import END, make_tokenizer
from benchmarks.study.run.specification import load_study
from benchmarks.study.tasks import corpus, pools, sources
from benchmarks.study.tasks.encoding import IGNORED, Encoded, collate, encode
from benchmarks.study.tasks.pools import Example

STUDY = Path(corpus.__file__).parents[1] / "studies"
DIGITS: dict[str, Any] = {"source": {"kind": "digits"}, "train": 100, "valid": 20, "test": 30, "label_noise": 0.3}


def test_test_and_validation_sets_are_the_same_for_all_seeds_and_apart_from_training() -> None:
    one, other = pools.load(DIGITS, 0), pools.load(DIGITS, 1)
    assert (one.valid, one.test, one.sha256) == (other.valid, other.test, other.sha256)
    assert one.train != other.train
    assert pools.load(DIGITS, 0) == one
    prompts = {example.prompt for example in one.train}
    assert not prompts & {example.prompt for example in (*one.valid, *one.test)}


def test_label_noise_changes_exactly_its_share() -> None:
    clean, noisy = pools.load({**DIGITS, "label_noise": 0.0}, 0), pools.load(DIGITS, 0)
    assert [example.prompt for example in clean.train] == [example.prompt for example in noisy.train]
    assert sum(a.answer != b.answer for a, b in zip(clean.train, noisy.train, strict=True)) == 30
    assert clean.test == noisy.test


def test_batches_go_through_all_examples_before_any_comes_again() -> None:
    order = pools.batch_order(examples=10, batch_size=4, steps=5, seed=3)
    flat = [index for batch in order for index in batch]
    assert [len(batch) for batch in order] == [4] * 5
    assert Counter(flat[:10]) == Counter(flat[10:]) == Counter(range(10))
    assert order == pools.batch_order(10, 4, 5, 3) != pools.batch_order(10, 4, 5, 4)


def test_only_the_answer_and_the_end_are_predicted() -> None:
    tokenizer = make_tokenizer(["abc", "abd"])
    end = tokenizer.eos_token_id
    ids = tokenizer("xyz")["input_ids"]
    (tokens, prompt, pixels), (short, *_) = encode(tokenizer, [Example("ab", "xyz"), Example("", "x")], max_length=20)
    assert tokens[-4:] == [*ids, end]
    assert tokens[0] == tokenizer.convert_tokens_to_ids(END)
    batch = collate([Encoded(tokens, prompt), Encoded(short, 1)], padding=end)
    assert pixels is None
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"][0].tolist() == [IGNORED] * prompt + [*ids, end]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(tokens), len(short)]
    assert batch["labels"][1, len(short) :].eq(IGNORED).all()
    (cut, kept, _), *_ = encode(tokenizer, [Example("abcabcabcabc", "xyz")], max_length=6)
    assert len(cut) == 6
    assert cut[kept:] == [*ids, end]


@pytest.mark.parametrize(
    "file", sorted(path.name for path in STUDY.glob("*.yaml") if path.stem not in ("tasks", "arms"))
)
def test_every_study_of_the_repository_can_be_read(file: str) -> None:
    study = load_study(STUDY / file)
    names = [cell.name for cell in study.cells()]
    assert len(set(names)) == len(names) > 0
    assert study.baseline in {arm.name for arm in study.arms}
    tasks_of = yaml.safe_load((STUDY / "tasks.yaml").read_text())
    assert {tasks_of[setting.task]["role"] for setting in study.settings} == {study.role}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["lorra"]}, "arm 'lorra' of tiny.yaml is not defined"),
        ({"role": "confirmation"}, "'digits' is kept for screening"),
        ({"role": "test"}, "choose one of screening, confirmation"),
        ({"rates": []}, "has no learning rates"),
        ({"models": {}}, "has no folder; add it to models"),
        ({"training": {"stepz": 3}}, "unknown option 'stepz'"),
        ({"settings": [{"model": "tiny", "task": "digits", "rank": 2}] * 2}, "two settings of one name"),
        ({"settings": [{"model": "tiny", "task": "digits", "rank": 2, "rate": 1}]}, "unknown key 'rate'"),
        ({"settings": [{"model": "tiny", "task": "dogs", "rank": 2}]}, "task 'dogs' of tiny.yaml is not defined"),
    ],
)
def test_what_a_study_gets_wrong_is_named(make_study: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make_study(**({"arms": ["lora"]} | changes))


def test_too_small_a_pool_is_named() -> None:
    with pytest.raises(StudyError, match="has 1797 examples and the task wants 5050"):
        pools.load({**DIGITS, "train": 5000}, 0)


def test_functions_lose_their_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "    total = 0\n" + "".join(f"    total += {number}\n" for number in range(20)) + "    return total"
    (tmp_path / "module.py").write_text(f'def add():\n    """Adds numbers.{" Adds numbers." * 9}"""\n{body}\n')
    (tmp_path / "test_module.py").write_text(f"def test_add():\n{body}\n")
    monkeypatch.setattr(corpus, "package_folder", lambda package: tmp_path)
    assert corpus.functions("made-up") == (f"def add():\n{body}",)
    assert corpus.docstrings("made-up") == (" ".join(["Adds numbers."] * 10),)


def test_raised_messages_go_with_the_name_of_their_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(
        "def f(x):\n"
        "    raise ValueError(f'the number {x} is\\n too large for this')\n"
        "    raise TypeError('too short')\n"
        "    raise KeyError(x)\n"
        "    raise module.Error('this one has no plain name at all')\n"
        "    raise RuntimeError('this happens when nothing else does', x)\n"
    )
    monkeypatch.setattr(corpus, "package_folder", lambda package: tmp_path)
    pairs = (
        ("the number _ is too large for this", "ValueError"),
        ("this happens when nothing else does", "RuntimeError"),
    )
    assert corpus.raised_messages("raising") == pairs
    source = {"packages": ["raising"], "kinds": ["RuntimeError", "ValueError"], "each": 1}
    made = sources.SOURCES["errors"](**source)
    assert made == [Example(f"{text}\nError:", f" {name}") for text, name in reversed(pairs)]


def test_a_chat_model_gets_the_prompt_as_a_turn_of_the_user() -> None:
    tokenizer = make_tokenizer(["abc"])
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[model]"
    )
    ((tokens, prompt, _),) = encode(tokenizer, [Example("ab", " xyz")], max_length=64)
    assert tokenizer.decode(tokens[:prompt]) == "[user]ab[model]"
    assert tokenizer.decode(tokens[prompt:]) == f"xyz{END}"


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
