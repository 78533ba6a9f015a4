"""Generation stops where targets end: in validation, in prediction, and in what is made of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import byte_tokenizer, quiet_trainer, write_jsonl
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from na_lora_lightning.arguments import AdapterOptions, EvaluationOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.answers import answer_text, as_list, end_mark, stop_at
from na_lora_lightning.modules.language import NALoRALightningModule

RECORDS = [{"prompt": question * 8, "completion": answer} for question, answer in zip("abcd", "wxyz", strict=True)]
# As with Qwen 3, whose last turn begins with what nobody said.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "special": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "not special": {"additional_special_tokens": ["<|im_start|>"]},
    "thinking": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": THINKING},
    "text alone": {"chat_template": None, "additional_special_tokens": []},
}


def chat_model(folder: Path, kind: str) -> tuple[str, Any]:
    """A base model whose own settings stop at the end of the sequence and at one more token."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", **KINDS[kind])
    # Added tokens that are no special ones.
    tokenizer.add_tokens({"not special": ["<|im_end|>"], "thinking": ["<think>", "</think>"]}.get(kind, []))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 7])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_its_answers_gets_all_of_them_right(tmp_path: Path, kind: str) -> None:
    base, tokenizer = chat_model(tmp_path / "base", kind)
    records = RECORDS[2:] if kind == "thinking" else RECORDS
    source = write_jsonl(tmp_path / "data.jsonl", records)
    data = InstructionDataModule(base, train=source, validation=source, predict=source, batch_size=4, seed=1)
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(
        base,
        lora=LoRAOptions(r=16, alpha=32),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        evaluation=EvaluationOptions(generate=True, max_new_tokens=32),
        adapter=AdapterOptions(folder=str(tmp_path / "adapter")),
    )
    epochs = 60 if kind == "thinking" else 30
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="last", save_top_k=1, every_n_epochs=epochs)
    trainer = quiet_trainer(
        tmp_path, max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=[saver], enable_checkpointing=True
    )
    trainer.fit(module, data)
    assert trainer.callback_metrics["validation/exact_match"] == 1.0

    end = tokenizer.eos_token_id if kind == "text alone" else tokenizer.convert_tokens_to_ids("<|im_end|>")
    known = [tokenizer.eos_token_id, 7]
    expected = known if end in known else [*known, end]
    answers = [text.rpartition("\n")[2] for text in predicted(module, data, tmp_path)]
    assert answers == [record["completion"] for record in records]

    # A checkpoint says where answers end to a module without data.
    loaded = NALoRALightningModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", model_name_or_path=base)
    assert loaded.peft_model.get_base_model().generation_config.eos_token_id == expected
    # So do the adapter's folder, and what is merged from either.
    assert GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == expected
    for adapter, output in (("checkpoints/last.ckpt", "other"), ("adapter", "merged")):
        merge_adapter(MergeOptions(tmp_path / adapter, tmp_path / output))
        assert GenerationConfig.from_pretrained(tmp_path / output).eos_token_id == expected

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("cccccccc")["input_ids"]
    if kind != "text alone":
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "cccccccc"}], add_generation_prompt=True, return_dict=False
        )
    tokens = merged.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0)[0].tolist()
    assert tokens[-1] == end
    assert len(tokens) < len(prompt) + 32
    assert tokenizer.decode(tokens[len(prompt) : -1]).endswith("y")


def predicted(module: NALoRALightningModule, data: InstructionDataModule, folder: Path) -> list[str]:
    return [text for batch in quiet_trainer(folder).predict(module, data) or [] for text in batch]


def test_the_text_of_an_answer_ends_at_the_first_end() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    a, b, end = tokenizer.convert_tokens_to_ids(["a", "b", "<|im_end|>"])
    assert answer_text(tokenizer, [a, end, b], {end}) == "a"
    assert answer_text(tokenizer, [a, b, end], {b}) == "a"
    assert answer_text(tokenizer, [a, end, b], set()) == "ab"
    assert answer_text(tokenizer, [end], {end}) == ""


def test_what_ends_a_turn() -> None:
    tokenizer = byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>\n"])
    assert end_mark(tokenizer, " \n<|im_end|>\n<|im_start|>") == " \n<|im_end|>\n"
    assert end_mark(tokenizer, "<|im_end|>x") == "<|im_end|>"
    assert end_mark(tokenizer, "x<|im_end|>") == ""
    assert end_mark(tokenizer, "") == ""


@pytest.mark.parametrize(
    ("before", "ends", "after"),
    [(None, [], None), (None, [3], 3), (3, [3], 3), (3, [4], [3, 4]), ([3, 5], [5, 4, 4], [3, 5, 4]), ([3], [], [3])],
)
def test_what_a_base_model_stops_at_is_kept(before: Any, ends: list[int], after: Any) -> None:
    config = GenerationConfig(eos_token_id=before)
    stop_at(config, ends)
    assert config.eos_token_id == after
    assert as_list(config.eos_token_id) == as_list(after)
