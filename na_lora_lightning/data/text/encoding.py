"""From records to tokens: which tokens a record has, and which of them the loss is computed on."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any, Literal

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from na_lora_lightning.data.answers import answer_text, first_whole_character, whole_characters
from na_lora_lightning.data.batching import IGNORED_LABEL
from na_lora_lightning.data.files.record_tables import code_revision
from na_lora_lightning.data.text.chat import ChatTemplate, Piece
from na_lora_lightning.data.text.records import Message, read_conversation, read_tools
from na_lora_lightning.data.text.tool_use import settle_tool_use
from na_lora_lightning.errors import ConfigurationError, DataError

# From a first token to the token after the last one.
Span = tuple[int, int]

_FEATURES = {
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    "tokens": Value("int64"),
    "target_tokens": Value("int64"),
    "truncated": Value("bool"),
    "end_ids": List(Value("int32")),
}
_EVALUATION_FEATURES = {
    "prompt_input_ids": List(Value("int32")),
    "prompt": Value("string"),
    "reference": Value("string"),
}


class RecordEncoder:
    """Turns a record into token ids and labels.

    A record has ``messages``, or ``prompt`` and ``completion``. The loss is on every assistant turn, its
    end-of-turn token included. If nothing marks the end of the last turn, the end-of-sequence token is added.

    Args:
        tokenizer: The tokenizer.
        max_length: The number of tokens that a record is cut to.
        loss_on: Whether the loss is on the completions or on all tokens.
        use_chat_template: Whether to render records with the tokenizer's chat template; None stands for
            whenever there is one.
        system_prompt: The system message for records that have none.

    Raises:
        ConfigurationError: The tokenizer lacks what the other arguments need.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        loss_on: Literal["completion", "all"],
        use_chat_template: bool | None,
        system_prompt: str | None,
    ) -> None:
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer {name!r} has no end-of-sequence token, from which the model learns to stop; "
                "set its eos_token."
            )
        if tokenizer.chat_template is None and (use_chat_template or system_prompt is not None):
            option = "use_chat_template" if use_chat_template else "system_prompt"
            raise ConfigurationError(
                f"the option {option} needs a chat template, which the tokenizer {name!r} lacks; use the "
                f"tokenizer of an instruction-tuned model or leave {option} out."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        self.use_chat_template = tokenizer.chat_template is not None and use_chat_template is not False
        self.system_prompt = system_prompt
        self.template = self._chat_template()
        self.end_of_turn_ids = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if self.use_chat_template and (end_of_turn := self.template.end_of_turn()):
            # Not all tokenizers call it special.
            self.end_of_turn_ids |= set(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"])
        # Without a template nothing but the end of the sequence ends an answer.
        self.stop_ids = self.end_of_turn_ids if self.use_chat_template else {tokenizer.eos_token_id}
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.leading_ids = [tokenizer.bos_token_id] if starts_with_bos else []
        # Tokenised data is cached under a hash of this object; results of other code must not be reused.
        self.revision = code_revision()

    @staticmethod
    def features(*, evaluation: bool) -> Features:
        """Returns the columns of encoded records."""
        return Features({**_FEATURES, **(_EVALUATION_FEATURES if evaluation else {})})

    def __call__(
        self, record: dict[str, Any], index: int, *, source: str, evaluation: bool, needs_completion: bool
    ) -> dict[str, Any]:
        """Encodes one record.

        Args:
            record: The record.
            index: Its position, from 0.
            source: The name of the data, for error messages.
            evaluation: Whether to add the prompt and the reference that generation is scored with.
            needs_completion: Whether a record without completion is an error.

        Raises:
            DataError: The record cannot be used.
        """
        record = dict(record)
        try:
            return self._with_tools(read_tools(record))._encode(record, evaluation, needs_completion)
        except DataError as error:
            raise DataError(f"record {index + 1} of {source!r} {error}") from error.__cause__

    def _with_tools(self, tools: list[dict[str, Any]] | None) -> RecordEncoder:
        """The encoder for one record."""
        if tools is None:
            return self
        if not self.use_chat_template:
            raise DataError("has 'tools', which need a chat template; use a tokenizer that has one, or remove them.")
        encoder = copy(self)
        encoder.template = self.template.with_options({"tools": tools})
        return encoder

    def _encode(self, record: dict[str, Any], evaluation: bool, needs_completion: bool) -> dict[str, Any]:
        messages = read_conversation(record, needs_completion=needs_completion, loss_on=self.loss_on)
        if self.use_chat_template and self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        elif not self.use_chat_template and record.get("messages") is not None:
            raise DataError(
                "has 'messages', which need a chat template; use a tokenizer that has one and do not set "
                "use_chat_template to false, or give 'prompt' and 'completion'."
            )
        if self.use_chat_template:
            messages = settle_tool_use(messages, self.template)
        roles = [message["role"] for message in messages]
        is_open = not needs_completion and roles[-1] != "assistant"
        context = messages if is_open else messages[: len(roles) - 1 - roles[::-1].index("assistant")]
        if not (self.use_chat_template or self.leading_ids or context[0]["content"]):
            raise DataError("has an empty prompt; give it a prompt or remove the record.")
        prompt_ids = self._prompt_ids(context) if evaluation or is_open else []
        complete, spans = (prompt_ids, []) if is_open else self._encode_complete(messages)
        if is_open:
            # A prompt is cut at its start, because generation continues its end.
            ids = self._end_of(prompt_ids)
            labels = [IGNORED_LABEL] * len(ids)
        else:
            ids, labels = self._beginning_of(complete, spans)
        encoded: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "tokens": len(ids),
            "target_tokens": len(labels) - labels.count(IGNORED_LABEL),
            "truncated": len(complete) > self.max_length,
            "end_ids": self._ends_of(complete, spans),
        }
        if evaluation:
            encoded["prompt_input_ids"] = self._end_of(prompt_ids)
            encoded["prompt"] = context[-1].get("content", "")
            encoded["reference"] = ""
            if not is_open:
                start, stop = spans[-1]
                if self.loss_on == "all" and complete[: len(prompt_ids)] == prompt_ids:
                    start = len(prompt_ids)
                encoded["reference"] = self._reference(complete[start:stop])
        return encoded

    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer of which nothing is known.

        Raises:
            DataError: The chat template refuses a conversation of one question and one answer.
        """
        return self._ends_of(*self._encode_complete(self.template.question_and_answer()))

    def _ends_of(self, ids: list[int], spans: list[Span]) -> list[int]:
        """The tokens that end the answers of a record; what ends in text alone is ended by none."""
        return sorted({ids[stop - 1] for _, stop in spans} & self.stop_ids)

    def _reference(self, answer: list[int]) -> str:
        """An answer as it is rendered, which is what a model learns to generate."""
        return answer_text(self.tokenizer, answer, {answer[-1]} & self.stop_ids)

    def _prompt_ids(self, context: list[Message]) -> list[int]:
        if self.use_chat_template:
            return self._tokenize(self.template.render(context, is_prompt=True))
        return self.leading_ids + self._tokenize(context[0]["content"])

    def _end_of(self, prompt_ids: list[int]) -> list[int]:
        """What is left of a prompt; it begins with a whole character."""
        return prompt_ids[first_whole_character(self.tokenizer, prompt_ids, len(prompt_ids) - self.max_length) :]

    def _beginning_of(self, ids: list[int], spans: list[Span]) -> tuple[list[int], list[int]]:
        """What is left of a record, which ends with a whole character, and its labels."""
        length = whole_characters(self.tokenizer, ids, self.max_length)
        labels = [IGNORED_LABEL] * length
        for start, stop in spans:
            labels[start:stop] = ids[start : min(stop, length)]
        if labels.count(IGNORED_LABEL) == length:
            raise DataError(
                f"keeps nothing of its completion when its {len(ids)} tokens are cut to "
                f"max_length={self.max_length}; raise max_length or shorten its prompt."
            )
        return ids[:length], ids[:length] if self.loss_on == "all" else labels

    def _encode_complete(self, messages: list[Message]) -> tuple[list[int], list[Span]]:
        """Returns the tokens of a record with a completion, and where its answers are."""
        if not self.use_chat_template:
            prompt, completion = (message["content"] for message in messages)
            ids, spans = self._encode_segments([(prompt, False), (completion, True)], self.leading_ids)
        elif self.loss_on == "completion":
            ids, spans = self._encode_segments(self.template.pieces(messages))
        else:
            first_answer = [message["role"] for message in messages].index("assistant")
            start = len(self._tokenize(self.template.render(messages[:first_answer], is_prompt=True)))
            ids = self._tokenize(self.template.render(messages))
            stop = self._length_to_end_of_turn(ids)
            spans = [(start, stop)] if start < stop else []
        ids, spans = self._terminate(ids, spans)
        if self.loss_on == "completion":
            for start, stop in spans:
                self._require_one_end(ids[start:stop])
        return ids, spans

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

    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
