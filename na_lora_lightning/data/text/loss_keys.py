"""Keys by which records say what the loss is on: turns that are left out, and what cannot be done, which is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from na_lora_lightning.errors import DataError

_ON = ("weight", "loss_weight", "sample_weight", "train", "training", "trainable", "train_on_turn", "loss", "learn")
_OFF = ("masked", "mask", "ignore", "ignore_loss", "skip_loss", "no_loss")
_DETAILS = ("train_detail", "loss_mask", "train_mask", "loss_on", "train_on")
# A record may have columns such as ``loss`` or ``mask`` that are about something else.
_ON_OF_RECORDS = ("weight", "loss_weight", "sample_weight", "train", "trainable")
_DETAILS_OF_RECORDS = ("loss_mask", "train_mask", "train_on_inputs", "chat_template_kwargs")

_MEANINGS: dict[Any, bool] = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True, "1.0": True}


def refuse_keys_of_records(record: dict[str, Any], loss_on: Literal["completion", "all"]) -> None:
    """Refuses keys of a record that ask for another loss than all records have.

    Raises:
        DataError: There is one. The message lacks its subject, which the caller knows.
    """
    key = next((key for key in _ON_OF_RECORDS if key in record and _meaning(record[key]) is not True), None)
    key = key or next((key for key in _DETAILS_OF_RECORDS if record.get(key)), None)
    if key is None and record.get("loss_on") not in (None, "", loss_on):
        key = "loss_on"
    if key is not None:
        raise DataError(
            f"has the key {key!r} ({_shown(record[key])}), but all records are trained on alike; remove the key, or "
            "the record."
        )


def learned_turns(messages: Sequence[dict[str, Any]], loss_on: Literal["completion", "all"]) -> list[bool]:
    """Which turns of the assistant the loss is on: all but those whose keys leave them out.

    The keys are those of other tools (``weight: 0`` of OpenAI, ``train`` and ``training`` of axolotl, ``loss``); of
    weights there are 0 and 1.

    Args:
        messages: The turns.
        loss_on: What the loss is on.

    Returns:
        For each turn of the assistant whether it is learned.

    Raises:
        DataError: A key asks for something else. The message lacks its subject, which the caller knows.
    """
    learned = []
    for number, message in enumerate(messages, start=1):
        is_answer = message["role"] == "assistant"
        is_target = loss_on == "all" or is_answer
        can_be_left_out = loss_on == "completion" and is_answer
        asked = {key: _meaning(message[key]) for key in _ON if key in message}
        asked |= {key: _negated(_meaning(message[key])) for key in _OFF if key in message}
        asked |= {key: None for key in _DETAILS if message.get(key)}
        for key, wanted in asked.items():
            if wanted is not is_target and not (can_be_left_out and wanted is False):
                where = "every turn" if loss_on == "all" else "the assistant's turns, each as a whole or not at all"
                raise DataError(
                    f"has the key {key!r} ({_shown(message[key])}) in message {number}, but the loss is on {where}; "
                    "remove the key, or end the record before that turn."
                )
        if is_answer:
            learned.append(all(wanted is not False for wanted in asked.values()) or loss_on == "all")
    return learned


def last_answer(messages: Sequence[dict[str, Any]], loss_on: Literal["completion", "all"]) -> int:
    """The place of the last turn of the assistant that is learned; where none is, of the last one.

    Args:
        messages: The turns, one of the assistant at least.
        loss_on: What the loss is on.
    """
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    learned = learned_turns(messages, loss_on)
    return max((place for place, is_learned in zip(answers, learned, strict=True) if is_learned), default=answers[-1])


def learned_spans(
    spans: list[Any], messages: Sequence[dict[str, Any]], loss_on: Literal["completion", "all"]
) -> list[Any]:
    """The answers that no key leaves out of the loss.

    Args:
        spans: Where the answers are.
        messages: The turns.
        loss_on: What the loss is on.

    Raises:
        DataError: One is to be left out, and which it is cannot be told. The message lacks its subject.
    """
    learned = learned_turns(messages, loss_on)
    if all(learned):
        return spans
    if len(spans) != len(learned):
        raise DataError(
            f"has a turn that is left out of the loss, but {len(spans)} of its {len(learned)} answers are in what the "
            "chat template makes of it; use a template that marks each answer."
        )
    return [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]


def _meaning(value: Any) -> bool | None:
    """Whether a value says yes or no; None where it says something else."""
    if isinstance(value, str):
        return _MEANINGS.get(value.strip().lower())
    return _MEANINGS.get(value) if isinstance(value, (bool, int, float)) else None


def _negated(meaning: bool | None) -> bool | None:
    return None if meaning is None else not meaning


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
