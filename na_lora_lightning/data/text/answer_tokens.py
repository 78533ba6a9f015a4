"""Tokenising texts so that the tokens of answers, and those that end them, are known."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from na_lora_lightning.data.answers import answer_text
from na_lora_lightning.data.text.chat import Piece
from na_lora_lightning.errors import DataError

# From a first token to the token after the last one.
Span = tuple[int, int]


class AnswerTokenizer:
    """A tokenizer that keeps answers apart from what is around them.

    Args:
        tokenizer: The tokenizer.
        end_of_turn: What its chat template puts behind an answer; None where no template is used, so that nothing but
            the end of the sequence ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn_ids = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if end_of_turn:
            # Not all tokenizers call it special.
            self.end_of_turn_ids |= set(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"])
        self.stop_ids = self.end_of_turn_ids if end_of_turn is not None else {tokenizer.eos_token_id}
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.leading_ids = [tokenizer.bos_token_id] if starts_with_bos else []

    def _ends_of(self, ids: list[int], spans: list[Span]) -> list[int]:
        """The tokens that end the answers of a record; what ends in text alone is ended by none."""
        return sorted({ids[stop - 1] for _, stop in spans} & self.stop_ids)

    def _reference(self, answer: list[int]) -> str:
        """An answer as it is rendered, which is what a model learns to generate."""
        return answer_text(self.tokenizer, answer, {answer[-1]} & self.stop_ids)

    def _encode_segments(
        self, segments: Iterable[Piece], leading_ids: Iterable[int] = ()
    ) -> tuple[list[int], list[Span]]:
        """Tokenises adjoining texts so that no token reaches from one into the next."""
        leading_ids = list(leading_ids)
        ids, text = list(leading_ids), ""
        spans: list[Span] = []
        for segment, is_answer in segments:
            text += segment
            # What the text adds to the tokens so far is right for tokenizers that put a space before any text
            # too; where a token would join two segments, they are tokenised apart, as at generation.
            joined = leading_ids + self._tokenize(text)
            new = joined[len(ids) :] if joined[: len(ids)] == ids else self._tokenize(segment)
            if is_answer and new:
                spans.append((len(ids), len(ids) + self._length_to_end_of_turn(new)))
            ids += new
        return ids, spans

    def _length_to_end_of_turn(self, ids: list[int]) -> int:
        """Counts the tokens up to an end-of-turn token that only white space follows, or all tokens."""
        end = len(ids)
        while end and self._is_space(ids[end - 1]):
            end -= 1
        return end if end and ids[end - 1] in self.end_of_turn_ids else len(ids)

    def _is_space(self, token_id: int) -> bool:
        return str(self.tokenizer.decode(token_id)).isspace()

    def _terminate(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Ends the sequence at its last target, which is a token to stop at."""
        if not spans:
            raise DataError("has no completion in what the chat template renders of it; correct the template.")
        *before, (start, stop) = spans
        if ids[stop - 1] in self.stop_ids:
            return ids[:stop], spans
        return [*ids[:stop], self.tokenizer.eos_token_id], [*before, (start, stop + 1)]

    def _require_one_end(self, answer: list[int]) -> None:
        """Refuses an answer that would be cut short when it is generated."""
        ends = {self.tokenizer.eos_token_id} | ({answer[-1]} & self.stop_ids)
        first = next((position for position, token_id in enumerate(answer) if token_id in ends), len(answer))
        if not all(token_id in self.end_of_turn_ids or self._is_space(token_id) for token_id in answer[first:]):
            raise DataError(
                f"has an answer with {self.tokenizer.decode(answer[first])!r} within it, which the tokenizer reads as "
                "the end of an answer, so that generation would stop there; remove it or write it in another way."
            )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
