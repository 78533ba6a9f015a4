"""What TRL and LLaMA-Factory make of one record of each format: tokens, and the labels that the loss is on.

``expected_of_others.json`` has what this prints. To compute it again, with both installed beside this project's own
requirements (``pip install --no-deps trl==1.16.0 llamafactory==0.9.5``): ``python tests/data/expected_of_others.py``.
With ``templates`` behind it, the training templates of TRL are compared.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from module_helpers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

# ChatML whose answers are marked, as in the training templates of TRL.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}<call>"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}</call>{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

_USER, _ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
_AGAIN = [{"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "4é"}]
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "system", "content": "Add."}, _USER, _ASSISTANT, *_AGAIN]},
    "prompt and completion": {"prompt": "1+1=", "completion": "2"},
    "prompt and completion of turns": {"prompt": [_USER, _ASSISTANT, _AGAIN[0]], "completion": [_AGAIN[1]]},
    "alpaca": {"instruction": "Add.", "output": "2"},
    "alpaca with input": {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be short."},
    "alpaca with history": {"instruction": "And 2+2?", "input": "", "output": "4", "history": [["1+1?", "2"]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "sharegpt with roles": {"conversations": [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": "2"}]},
    "text": {"text": "One and one\nis two."},
    "tools": {
        "messages": [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            _ASSISTANT,
        ],
        "tools": [TOOL],
    },
}


def tokenizer_of(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    return byte_tokenizer(template, pad_token="<|pad|>")


def by_trl(record: dict[str, Any]) -> dict[str, list[int]]:
    """What ``SFTTrainer`` prepares: its ``assistant_only_loss`` for messages, ``completion_only_loss`` for the rest."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of()
    is_messages = "messages" in record or "conversations" in record
    config = SFTConfig(
        output_dir="unused", assistant_only_loss=is_messages, max_length=None, report_to=[], bf16=False, use_cpu=True
    )
    trainer: Any = SFTTrainer.__new__(SFTTrainer)
    vars(trainer).update(_tokenizer=tokenizer, completion_only_loss="prompt" in record, chat_template=None)
    prepared = trainer._prepare_dataset(Dataset.from_list([record]), tokenizer, config, False, None, "train")[0]
    return {name: prepared[name] for name in ("input_ids", "labels")}


def by_llamafactory(record: dict[str, Any]) -> dict[str, list[int]]:
    """What LLaMA-Factory encodes with its template ``chatml``."""
    from llamafactory.data.converter import AlpacaDatasetConverter, SharegptDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES

    tokenizer = tokenizer_of()
    names = {name: name for name in ("system", "history") if name in record}
    attributes = DatasetAttr("file", "data", **names)  # type: ignore[arg-type]
    options: Any = SimpleNamespace(cutoff_len=4096, train_on_prompt=False, mask_history=False, media_dir=".")
    converter = SharegptDatasetConverter if "conversations" in record else AlpacaDatasetConverter
    example = converter(attributes, options)({"input": "", **record})
    processor = SupervisedDatasetProcessor(TEMPLATES["chatml"], tokenizer, None, options)
    ids, labels = processor._encode_data_example(
        prompt=example["_prompt"], response=example["_response"], system=example["_system"], tools=example["_tools"],
        images=[], videos=[], audios=[],
    )  # fmt: skip
    return {"input_ids": ids, "labels": labels}


def compare_templates() -> None:
    """Says for each training template of TRL whether our tokens and targets are its own."""
    import trl
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from na_lora_lightning.data.text.encoding import RecordEncoder
    from na_lora_lightning.data.text.tokenizer import choose_chat_template
    from na_lora_lightning.errors import NALoRAError

    disable_progress_bars()
    record = {"messages": [_USER, _ASSISTANT, *_AGAIN]}
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in record["messages"]]
    options: dict[str, Any] = {"max_length": 9999, "loss_on": "completion", "use_chat_template": None}
    config = SFTConfig(output_dir="unused", assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True)
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        own = file.with_name(file.name.replace("_training", "")).read_text(encoding="utf-8")
        is_of_parts = any(name in file.name for name in ("idefics", "smolvlm", "llava"))
        rendered = byte_tokenizer(own, bos_token="<s>").apply_chat_template(
            parts if is_of_parts else record["messages"], tokenize=False
        )
        # All but those around reasoning, which are no special tokens.
        special = list(dict.fromkeys(re.findall(r"<(?!think)[^<>\n/]+>|</s>", str(rendered))))
        last = max(special, key=str(rendered).rfind)
        tokenizer = byte_tokenizer(
            own, bos_token="<s>", pad_token="<|pad|>", eos_token=last, additional_special_tokens=special
        )
        says = []
        for training in (None, choose_chat_template(tokenizer, "training")):
            encoder = RecordEncoder(tokenizer, system_prompt=None, training_template=training, **options)
            try:
                ours = encoder(record, 0, source="record", evaluation=False, needs_completion=True)
                says.append("its own template is read")
            except NALoRAError as error:
                says.append(f"refused: {str(error)[:90]}")
        try:
            trainer: Any = SFTTrainer.__new__(SFTTrainer)
            vars(trainer).update(_tokenizer=tokenizer, completion_only_loss=False, chat_template=training)
            theirs = trainer._prepare_dataset(Dataset.from_list([record]), tokenizer, config, False, None, "train")[0]
        except Exception as error:
            print(f"{file.name}: {says[0]}; TRL fails on it ({error})")
            continue
        ids = theirs["input_ids"]
        same = ids[: len(ours["input_ids"])] == ours["input_ids"]
        pairs = zip(ours["labels"], theirs["labels"], strict=False)
        only = [tokenizer.decode(max(pair)) for pair in pairs if pair[0] != pair[1]]
        print(f"{file.name}: {says[0]}; with TRL's: {'the same tokens' if same else says[1]}, targets differ in {only}")


def main() -> None:
    """Prints the expected values as JSON, or what comes of templates."""
    if sys.argv[1:] == ["templates"]:
        compare_templates()
        return
    expected = {}
    for name, record in RECORDS.items():
        is_alpaca, is_shared = name.startswith("alpaca"), name == "sharegpt"
        expected[name] = {
            **({} if is_alpaca or is_shared else {"trl": by_trl(record)}),
            **({"llamafactory": by_llamafactory(record)} if is_alpaca or is_shared else {}),
        }
    lines = [f'  "{name}": {json.dumps(values, separators=(",", ":"))}' for name, values in expected.items()]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
