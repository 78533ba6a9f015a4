"""Where answers end: tokens that stop generation, the text before them, and whole characters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# UTF-8 has at most this many bytes for a character, and a token at least one of them.
_LONGEST_CHARACTER = 4


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end_ids: Collection[int]) -> str:
    """The text of an answer: what comes before the first token that ends it, without special tokens.

    Args:
        tokenizer: Of the model.
        ids: Tokens of the answer, with or without what follows its end.
        end_ids: The tokens that end answers; not all of them need be special ones.

    Returns:
        The text. What is generated and what it should have been are compared in this form, so that a model that has
        learned its targets exactly gets all of them right.
    """
    length = next((position for position, token_id in enumerate(ids) if token_id in end_ids), len(ids))
    return str(tokenizer.decode(list(ids[:length]), skip_special_tokens=True))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of the tokens that a tokenizer has been given besides its vocabulary, white space left out."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {str(tokenizer.eos_token)}
    return tuple(name for name in names if name.strip())


def end_mark(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The beginning of ``text`` up to a token that a tokenizer has been given besides its vocabulary.

    Args:
        tokenizer: Of the model; whether the token is a special one does not matter.
        text: What a chat template puts behind an answer.

    Returns:
        White space and the token; the empty string if anything else comes first.
    """
    marks = sorted(map(re.escape, added_tokens(tokenizer)), key=len, reverse=True)
    found = re.match(rf"\s*(?:{'|'.join(marks)})", text)
    return found.group() if found else ""


def whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int) -> int:
    """The largest number of tokens up to ``length`` after which no character of ``ids`` is cut in two."""
    if length >= len(ids):
        return len(ids)

    def decode(end: int) -> str:
        return str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))

    following = decode(length + _LONGEST_CHARACTER)
    for end in range(length, max(length - _LONGEST_CHARACTER, 0), -1):
        if following.startswith(decode(end)):
            return end
    return length


def first_whole_character(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> int:
    """The smallest number of tokens from ``start`` on before which no character of ``ids`` is cut in two."""
    if start <= 0:
        return 0

    def decode(begin: int) -> str:
        return str(tokenizer.decode(list(ids[begin:]), clean_up_tokenization_spaces=False))

    preceding = decode(max(start - _LONGEST_CHARACTER, 0))
    for begin in range(start, min(start + _LONGEST_CHARACTER, len(ids))):
        if preceding.endswith(decode(begin)):
            return begin
    return start


def as_list(ids: int | Iterable[int] | None) -> list[int]:
    """Token ids as a generation config has them: none, one, or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def stop_at(config: GenerationConfig, end_ids: Iterable[int]) -> None:
    """Has generation stop at ``end_ids`` too, besides where it did; what was there stays first."""
    before = as_list(config.eos_token_id)
    ends = before + [token_id for token_id in dict.fromkeys(end_ids) if token_id not in before]
    if ends != before:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
