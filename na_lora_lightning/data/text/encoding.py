"""From records to tokens: which tokens a record has, and which of them the loss is computed on."""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from na_lora_lightning.data.answers import first_whole_character, whole_characters
from na_lora_lightning.data.batching import IGNORED_LABEL
from na_lora_lightning.data.files.record_tables import code_revision
from na_lora_lightning.data.text.answer_tokens import AnswerTokenizer, Span
from na_lora_lightning.data.text.chat import ChatTemplate
from na_lora_lightning.data.text.formats import Format, Record, recognise
from na_lora_lightning.data.text.loss_keys import last_answer, learned_spans
from na_lora_lightning.data.text.records import Message, read_conversation, read_tools
from na_lora_lightning.data.text.tool_use import settle_tool_use
from na_lora_lightning.errors import ConfigurationError, DataError

_FEATURES = {
    "index": Value("int64"),
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    "tokens": Value("int64"),
    "target_tokens": Value("int64"),
    "truncated": Value("bool"),
    "end_ids": List(Value("int32")),
}
TooLong = Literal["error", "truncate", "leave_out"]
_EVALUATION_FEATURES = {
    "prompt_input_ids": List(Value("int32")),
    "prompt": Value("string"),
    "reference": Value("string"),
}


class RecordEncoder(AnswerTokenizer):
    """Turns a record into token ids and labels.

    A record has one of the formats of :mod:`~na_lora_lightning.data.text.formats`. The loss is on every assistant turn
    that no key leaves out, its end-of-turn token included, and on all of a plain text. If nothing marks the end of the
    last turn, the end-of-sequence token is added.

    Args:
        tokenizer: The tokenizer.
        max_length: The largest number of tokens of a record.
        loss_on: Whether the loss is on the completions or on all tokens.
        use_chat_template: Whether to render records with the tokenizer's chat template; None stands for
            whenever there is one.
        system_prompt: The system message for records that have none.
        training_template: A chat template for conversations, in place of the tokenizer's, which prompts have.
        too_long: What becomes of records with more tokens: an ``error``, which names the first; to ``truncate`` them;
            or to ``leave_out``, which empties them.

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
        training_template: str | None = None,
        too_long: TooLong = "truncate",
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
        self.training_template = training_template
        self.too_long = too_long
        self.template = self._chat_template()
        super().__init__(tokenizer, self.template.end_of_turn() if self.use_chat_template else None)
        # Tokenised data is cached under a hash of this object; results of other code must not be reused.
        self.revision = code_revision()

    @staticmethod
    def features(*, evaluation: bool) -> Features:
        """Returns the columns of encoded records."""
        return Features({**_FEATURES, **(_EVALUATION_FEATURES if evaluation else {})})

    def __call__(
        self,
        record: Record,
        index: int,
        *,
        source: str,
        evaluation: bool,
        needs_completion: bool,
        form: Format | None = None,
    ) -> dict[str, Any]:
        """Encodes one record.

        Args:
            record: The record.
            index: Its position, from 0.
            source: The name of the data, for error messages.
            evaluation: Whether to add the prompt and the reference that generation is scored with.
            needs_completion: Whether a record without completion is an error.
            form: Its format; None to tell by its own keys.

        Raises:
            DataError: The record cannot be used.
        """
        form = form or recognise(record, source, None, needs_completion=needs_completion)
        try:
            record = self._read(record, form)
            encoded = self._with_tools(read_tools(record))._encode(record, evaluation, needs_completion)
        except DataError as error:
            raise DataError(f"record {index + 1} of {source!r} {error}") from error.__cause__
        return {"index": index, **encoded}

    def _read(self, record: Record, form: Format) -> Record:
        """A record of some format as messages, prompt and completion, or text."""
        return form.read(dict(record), self.use_chat_template)

    def _with_tools(self, tools: list[dict[str, Any]] | None) -> RecordEncoder:
        """The encoder for one record."""
        if tools is None:
            return self
        if not self.use_chat_template:
            raise DataError("has 'tools', which need a chat template; use a tokenizer that has one, or remove them.")
        encoder = copy(self)
        encoder.template = self.template.with_options({"tools": tools})
        return encoder

    def _conversation(self, record: Record, messages: list[Message]) -> list[Message]:
        """The turns of a record as they are rendered, its own system message or that of the options before them."""
        if not self.use_chat_template and record.get("messages") is not None:
            raise DataError(
                "has 'messages', which need a chat template; use a tokenizer that has one and do not set "
                "use_chat_template to false, or give 'prompt' and 'completion'."
            )
        system = record.get("system") or self.system_prompt
        if system is not None and messages[0]["role"] != "system":
            if not self.use_chat_template:
                raise DataError("has a 'system' text, which needs a chat template; use a tokenizer that has one.")
            if not isinstance(system, str):
                raise DataError(
                    f"needs text as its system, which is of type {type(system).__name__}; make it a string."
                )
            messages = [{"role": "system", "content": self._content(system)}, *messages]
        return settle_tool_use(messages, self.template) if self.use_chat_template else messages

    def _content(self, text: str) -> Any:
        """The content of a turn."""
        return text

    def _encode(self, record: Record, evaluation: bool, needs_completion: bool) -> dict[str, Any]:
        if "text" in record and not {"messages", "prompt"} & record.keys():
            return self._encode_plain_text(record["text"], evaluation, needs_completion)
        messages = read_conversation(record, needs_completion=needs_completion, loss_on=self.loss_on)
        messages = self._conversation(record, messages)
        roles = [message["role"] for message in messages]
        is_open = not needs_completion and roles[-1] != "assistant"
        context = messages if is_open else messages[: last_answer(messages, self.loss_on)]
        if not (self.use_chat_template or self.leading_ids or context[0]["content"]):
            raise DataError("has an empty prompt; give it a prompt or remove the record.")
        prompt_ids = self._prompt_ids(context) if evaluation or is_open else []
        complete, spans = (prompt_ids, []) if is_open else self._encode_complete(messages)
        if self._is_left_out(complete):
            return _left_out(evaluation)
        if is_open:
            # A prompt is cut at its start, because generation continues its end.
            ids = self._end_of(prompt_ids)
            labels = [IGNORED_LABEL] * len(ids)
        else:
            spans = learned_spans(spans, messages, self.loss_on) or spans
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

    def _encode_plain_text(self, text: str, evaluation: bool, needs_completion: bool) -> dict[str, Any]:
        """Encodes a plain text: the loss is on all of it, and what is to be predicted goes on with it."""
        complete = self.leading_ids + self._tokenize(text)
        start = len(complete)
        if needs_completion:
            start, eos = len(self.leading_ids), self.tokenizer.eos_token_id
            complete += [eos] if complete[-1] != eos else []
        if self._is_left_out(complete):
            return _left_out(evaluation)
        if needs_completion:
            ids, labels = self._beginning_of(complete, [(0, len(complete))])
        else:
            ids = self._end_of(complete)
            labels = [IGNORED_LABEL] * len(ids)
        encoded = {
            "input_ids": ids,
            "labels": labels,
            "tokens": len(ids),
            "target_tokens": len(labels) - labels.count(IGNORED_LABEL),
            "truncated": len(complete) > self.max_length,
            "end_ids": self._ends_of(complete, [(start, len(complete))][:needs_completion]),
        }
        if evaluation:
            # Text that is to be generated from nothing begins after what ends another.
            prompt = complete[:start] or [self.tokenizer.eos_token_id]
            reference = self._reference(complete[start:]) if needs_completion else ""
            given = "" if needs_completion else text
            encoded |= {"prompt_input_ids": self._end_of(prompt), "prompt": given, "reference": reference}
        return encoded

    def _is_left_out(self, ids: list[int]) -> bool:
        if len(ids) > self.max_length and self.too_long == "error":
            raise DataError(
                f"has {len(ids)} tokens, more than max_length={self.max_length}; raise max_length, shorten it, or set "
                "too_long to 'truncate' or 'leave_out'."
            )
        return len(ids) > self.max_length and self.too_long == "leave_out"

    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer of which nothing is known.

        Raises:
            DataError: The chat template refuses a conversation of one question and one answer.
        """
        return self._ends_of(*self._encode_complete(self.template.question_and_answer()))

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

    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, training=self.training_template)


def _left_out(evaluation: bool) -> dict[str, Any]:
    """What stands for a record that is too long until the others are known."""
    empty: dict[str, Any] = {"input_ids": [], "labels": [], "tokens": 0, "target_tokens": 0, "end_ids": []}
    prompt = {"prompt_input_ids": [], "prompt": "", "reference": ""} if evaluation else {}
    return {**empty, **prompt, "truncated": True}
