"""Examples as token ids, and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.tasks import Example

IGNORED = -100
Encoded = tuple[list[int], int]


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Token ids of prompt, answer and end, and how many of them are prompt.

    A tokenizer with a chat template is given the prompt as a user's turn. A longer example loses the start of its
    prompt, or, where it has none, its end.
    """
    encoded = []
    for example in examples:
        if example.prompt and tokenizer.chat_template:
            turn = [{"role": "user", "content": example.prompt}]
            prompt = list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
            text = example.answer.lstrip()
        else:
            text = example.answer
            prompt = [tokenizer.bos_token_id, *tokenizer(example.prompt, add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        answer = answer[: max_length - 1]
        prompt = prompt[-(max_length - len(answer)) :]
        encoded.append(([*prompt, *answer], len(prompt)))
    return encoded


def collate(encoded: Sequence[Encoded], padding: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, longest]`` int64, padded on the right.

    Labels are -100 on the prompt and on padding.
    """
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), longest), padding)
    mask = torch.zeros((len(encoded), longest), dtype=torch.long)
    labels = torch.full((len(encoded), longest), IGNORED)
    for row, (tokens, prompt) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
