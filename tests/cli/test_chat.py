"""Chat: what a model is given and answers is what ``predict`` gives and answers; two sides; the commands."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import byte_tokenizer, quiet_trainer, saved_model, trained
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from vision_helpers import IMAGE_TOKEN, vlm_folders, write_vision_records  # noqa: F401

from na_lora_lightning import AdapterOptions, NALoRALightningModule
from na_lora_lightning.cli.chat import Chat, Conversation
from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.speaker import AnswerSettings, Speaker
from na_lora_lightning.data import InstructionDataModule, VisionInstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.evaluation import prompt_inputs

CPU = torch.device("cpu")


def chat_model(folder: Path) -> str:
    """A tiny model with a tokenizer that knows turns."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def said(speaker: Speaker, *texts: str, system: str | None = None, **settings: Any) -> list[str]:
    conversation = Conversation(speaker, AnswerSettings(**{"max_new_tokens": 5, **settings}), system)
    return [conversation.reply(text, [], lambda piece: None) for text in texts]


def test_the_model_is_given_what_predict_gives_it(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base")
    messages = [
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "2"},
    ]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data = InstructionDataModule(base, predict=str(tmp_path / "prompts.jsonl"), system_prompt="Be brief.")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    speaker = Speaker(base, None, "auto", CPU)
    inputs = speaker.inputs_of([{"role": "system", "content": "Be brief."}, *messages], [])
    assert inputs["input_ids"].equal(batch["prompt_input_ids"])
    module = NALoRALightningModule(base, evaluation={"max_new_tokens": 9}, adapter=AdapterOptions(write="never"))
    (answers,) = quiet_trainer(tmp_path).predict(module, data)  # type: ignore[misc]
    pieces: list[str] = []
    answer = speaker.answer(inputs, AnswerSettings(max_new_tokens=9), pieces.append)
    # But for what would command the terminal.
    assert [answer] == [text.replace("\x7f", "") for text in answers]
    assert "".join(pieces) == answer


def test_an_adapter_answers_beside_its_base(tmp_path: Path) -> None:
    module = trained(saved_model(tmp_path / "base"), tmp_path)
    speaker, base = Speaker(str(tmp_path), None, "auto", CPU), Speaker(str(tmp_path / "base"), None, "auto", CPU)
    speaker.require_base()
    assert speaker.title == f"{tmp_path}/adapter (step 3, the last) on {tmp_path}/base"
    inputs = speaker.inputs_of([{"role": "user", "content": "1+2"}], [])
    logits = [entry(**inputs).logits for entry in (speaker.model, module.peft_model.eval(), base.model)]
    torch.testing.assert_close(logits[0], logits[1])
    sides = [Conversation(speaker, AnswerSettings(max_new_tokens=12), adapted=adapted) for adapted in (False, True)]
    answers = [side.reply("1+2", [], lambda piece: None) for side in sides]
    assert answers[0] == said(base, "1+2", max_new_tokens=12)[0] != answers[1]
    # The adapter is on again.
    assert speaker.model(**inputs).logits.equal(logits[0])


def test_what_was_said_goes_on_until_it_is_forgotten(tmp_path: Path) -> None:
    speaker = Speaker(chat_model(tmp_path / "base"), None, "auto", CPU)
    given: list[list[dict[str, Any]]] = []
    inputs_of = speaker.inputs_of
    speaker.inputs_of = lambda messages, images: given.append(messages) or inputs_of(messages, images)  # type: ignore[func-returns-value, method-assign]
    output = io.StringIO()
    chat = Chat([Conversation(speaker, AnswerSettings(max_new_tokens=3), "S")], Console(file=output, width=80))
    for line in ("one", "  ", "//two", "/system T", "three", "/new", "/system", "four"):
        assert chat.take(line)
    assert not chat.take("/quit")
    contents = [[message["content"] for message in messages] for messages in given]
    first = contents[1][2]
    assert contents == [["S", "one"], ["S", "one", first, "/two"], ["T", "three"], ["four"]]
    assert first in output.getvalue()
    assert chat.take("/nothing")
    assert chat.take("/image there.png")
    assert "There is no command /nothing; /help lists them." in output.getvalue()
    assert "This model takes no images." in output.getvalue()


def test_texts_are_continued_without_a_template(tmp_path: Path) -> None:
    speaker = Speaker(saved_model(tmp_path / "base"), None, "auto", CPU)
    assert not speaker.has_template
    first, second = said(speaker, "1+", "2+")
    assert [first, second] == [said(speaker, text)[0] for text in ("1+", "2+")]


def test_drawn_answers_follow_the_seed(tmp_path: Path) -> None:
    speaker = Speaker(chat_model(tmp_path / "base"), None, "auto", CPU)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn += said(speaker, "x", max_new_tokens=20, temperature=1.0)
    assert drawn[0] == drawn[1] != drawn[2]
    assert said(speaker, "x", temperature=1.0, top_p=1e-6) == said(speaker, "x")


def test_answers_do_not_command_the_terminal_and_an_interruption_ends_one(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base")
    speaker = Speaker(base, None, "auto", CPU)
    ids = iter(speaker.tokenizer("a\x1b[2Jb\tc é\x07 d e f g", add_special_tokens=False)["input_ids"])

    def generate(input_ids: torch.Tensor, streamer: Any, **others: Any) -> None:
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    speaker.model.generate = generate
    assert said(speaker, "x") == ["a[2Jb\tc é d e f g"]


@pytest.mark.parametrize("kind", ["idefics3", "llava", "qwen2_vl", "gemma3"])
def test_images_are_read_as_in_prediction(tmp_path: Path, vlm: Callable[[str], str], kind: str) -> None:
    data = VisionInstructionDataModule(vlm(kind), predict=write_vision_records(tmp_path, 1))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    expected = prompt_inputs(batch)
    speaker = Speaker(vlm(kind), None, "auto", CPU)
    conversation = Conversation(speaker, AnswerSettings(max_new_tokens=2))
    output = io.StringIO()
    chat = Chat([conversation], Console(file=output, width=80))
    given: list[dict[str, Any]] = []
    answer = speaker.answer
    speaker.answer = lambda inputs, *others: given.append(inputs) or answer(inputs, *others)  # type: ignore[func-returns-value, method-assign]
    assert chat.take(f"/image {tmp_path / 'pictures' / '0.png'}")
    assert chat.take("x")
    for name, value in expected.items():
        assert given[0][name].equal(value), name
    # The image stays part of what was said.
    assert chat.take("y")
    images = [
        int((inputs["input_ids"] == speaker.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[kind])).sum())
        for inputs in given
    ]
    assert images[0] == images[1] > 0
    assert chat.take("/image nowhere.png")
    assert "which does not exist" in " ".join(output.getvalue().split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "--compare is for adapters"),
        (["--system", "S"], "--system needs a chat template"),
        (["--base", "other"], "is no adapter"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--top_p", "0"], "--top_p is 0.0"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--device", "toaster"], "there is no device 'toaster'"),
        (["--tempreature", "1"], "see 'na-lora chat --help'"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    base = saved_model(tmp_path / "base")
    capsys.readouterr()
    assert main(["chat", base, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_base_that_an_adapter_changed_is_not_compared(tmp_path: Path) -> None:
    trained(saved_model(tmp_path / "base"), tmp_path, init_lora_weights="pissa")
    with pytest.raises(ConfigurationError, match="init_lora_weights='pissa', which takes weights out of the base"):
        Speaker(str(tmp_path), None, "auto", CPU).require_base()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no adapter"):
        Speaker(str(tmp_path / "empty"), None, "auto", CPU)
    checkpoint = tmp_path / "empty" / "checkpoints" / "step=3.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    with pytest.raises(ConfigurationError, match=r"has not ended and .*step=3\.ckpt', with 'na-lora merge'"):
        Speaker(str(tmp_path / "empty"), None, "auto", CPU)
    with pytest.raises(ConfigurationError, match=r"step=3\.ckpt' is a file; .* make a model with 'na-lora merge'"):
        Speaker(str(checkpoint), None, "auto", CPU)


def test_lines_are_read_from_a_pipe_and_long_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(saved_model(tmp_path / "base", "gpt2"), tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+\n" + "1" * 99 + "\n"))
    capsys.readouterr()
    assert main(["chat", str(tmp_path), "--compare", "--max_new_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert "base model" in printed
    assert "with the adapter" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "Your message cannot be answered" in printed
