"""From records to tokens: which tokens a record has, and which of them the loss is computed on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from datasets import Features, List, Value
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from na_lora_lightning.data.batching import IGNORED_LABEL
from na_lora_lightning.data.records import Message, read_conversation
from na_lora_lightning.errors import ConfigurationError, DataError

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

_FEATURES = {
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    "tokens": Value("int64"),
    "target_tokens": Value("int64"),
    "truncated": Value("bool"),
}
_EVALUATION_FEATURES = {
    "prompt_input_ids": List(Value("int32")),
    "prompt": Value("string"),
    "reference": Value("string"),
}


def load_tokenizer(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, or explains in one sentence why it cannot be loaded."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and name_or_path.startswith(("/", "./", "../", "~")):
        raise ConfigurationError(f"The tokenizer folder {name_or_path!r} does not exist; correct the path.")
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name_or_path,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if folder.is_dir():
            reason = "the folder has no tokenizer that transformers can read"
        raise ConfigurationError(
            f"The tokenizer {name_or_path!r} cannot be loaded ({reason}); give the folder of a tokenizer or "
            "its name on the hub."
        ) from error


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
        ConfigurationError: If the tokenizer lacks what the other arguments need.
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
                f"The tokenizer {name!r} has no end-of-sequence token, from which the model learns to stop; "
                "set its eos_token."
            )
        if tokenizer.chat_template is None and (use_chat_template or system_prompt is not None):
            option = "use_chat_template" if use_chat_template else "system_prompt"
            raise ConfigurationError(
                f"The option {option} needs a chat template, which the tokenizer {name!r} lacks; use the "
                f"tokenizer of an instruction-tuned model or leave {option} out."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        self.use_chat_template = tokenizer.chat_template is not None and use_chat_template is not False
        self.system_prompt = system_prompt
        self.marks_answers = self.use_chat_template and bool(_GENERATION_MARKER.search(tokenizer.get_chat_template()))
        self.end_of_turn_ids = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.leading_ids = [tokenizer.bos_token_id] if starts_with_bos else []
        # Tokenised data is cached under a hash of this object; results of other code must not be reused.
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        self.revision = hashlib.sha256(code).hexdigest()

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
            DataError: If the record cannot be used.
        """
        try:
            return self._encode(dict(record), evaluation, needs_completion)
        except DataError as error:
            raise DataError(f"Record {index + 1} of {source!r} {error}") from error.__cause__

    def _encode(self, record: dict[str, Any], evaluation: bool, needs_completion: bool) -> dict[str, Any]:
        messages = read_conversation(record, needs_completion=needs_completion)
        if self.use_chat_template and self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        elif not self.use_chat_template and record.get("messages") is not None:
            raise DataError(
                "has 'messages', which need a chat template; use a tokenizer that has one and do not set "
                "use_chat_template to false, or give 'prompt' and 'completion'."
            )
        roles = [message["role"] for message in messages]
        is_open = not needs_completion and roles[-1] != "assistant"
        context = messages if is_open else messages[: len(roles) - 1 - roles[::-1].index("assistant")]
        if not (self.use_chat_template or self.leading_ids or context[0]["content"]):
            raise DataError("has an empty prompt; give it a prompt or remove the record.")
        prompt_ids = self._prompt_ids(context) if evaluation or is_open else []
        if is_open:
            # A prompt is cut at its start, because generation continues its end.
            length, ids = len(prompt_ids), prompt_ids[-self.max_length :]
            labels = [IGNORED_LABEL] * len(ids)
        else:
            length, ids, labels = self._encode_complete(messages)
        encoded: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "tokens": len(ids),
            "target_tokens": len(labels) - labels.count(IGNORED_LABEL),
            "truncated": length > self.max_length,
        }
        if evaluation:
            encoded["prompt_input_ids"] = prompt_ids[-self.max_length :]
            encoded["prompt"] = context[-1]["content"]
            encoded["reference"] = "" if is_open else messages[len(context)]["content"]
        return encoded

    def _prompt_ids(self, context: list[Message]) -> list[int]:
        if self.use_chat_template:
            return self._tokenize(self._render(context, is_prompt=True))
        return self.leading_ids + self._tokenize(context[0]["content"])

    def _encode_complete(self, messages: list[Message]) -> tuple[int, list[int], list[int]]:
        """Returns the length before truncation, the tokens and the labels of a record with a completion."""
        if self.use_chat_template:
            ids, is_target = self._encode_conversation(messages)
        else:
            prompt, completion = (message["content"] for message in messages)
            ids, is_target = self._encode_segments([(prompt, False), (completion, True)], self.leading_ids)
        ids, is_target = self._terminate(ids, is_target)
        length = len(ids)
        ids, is_target = ids[: self.max_length], is_target[: self.max_length]
        if not any(is_target):
            raise DataError(
                f"keeps nothing of its completion when its {length} tokens are cut to "
                f"max_length={self.max_length}; raise max_length or shorten its prompt."
            )
        if self.loss_on == "all":
            return length, ids, list(ids)
        return length, ids, [i if target else IGNORED_LABEL for i, target in zip(ids, is_target, strict=True)]

    def _encode_conversation(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        if self.loss_on == "all":
            first_answer = [message["role"] for message in messages].index("assistant")
            prompt_length = len(self._tokenize(self._render(messages[:first_answer], is_prompt=True)))
            ids = self._tokenize(self._render(messages))
            ids = ids[: self._length_to_end_of_turn(ids)]
            return ids, [position >= prompt_length for position in range(len(ids))]
        if not self.marks_answers:
            return self._encode_segments(self._segments(messages))
        encoded = self._apply_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]

    def _segments(self, messages: list[Message]) -> Iterable[tuple[str, bool]]:
        """Splits a rendered conversation into answers and the text between them.

        An answer is what its turn adds to the rendering of the turns before it. That holds only for templates
        whose rendering of a conversation begins with that of its first turns, which is why it is checked.
        """
        end = 0
        complete = self._render(messages)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], is_prompt=True)
            answered = self._render(messages[: turn + 1])
            if not (complete.startswith(answered) and answered.startswith(prompt) and len(prompt) >= end):
                raise DataError(
                    f"has an answer (message {turn + 1}) that the chat template renders differently with and "
                    "without the turns around it, so that its tokens cannot be told from the others; use a "
                    "template with {% generation %} markers, loss_on: all, or records with one answer each."
                )
            yield prompt[end:], False
            yield answered[len(prompt) :], True
            end = len(answered)
        if end < len(complete):
            yield complete[end:], False

    def _encode_segments(
        self, segments: Iterable[tuple[str, bool]], leading_ids: Iterable[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Tokenises adjoining texts so that no token reaches from one into the next."""
        leading_ids = list(leading_ids)
        text = ""
        ids = list(leading_ids)
        is_target = [False] * len(ids)
        for segment, target in segments:
            text += segment
            # What the text adds to the tokens so far is right for tokenizers that put a space before any text
            # too; where a token would join two segments, they are tokenised apart, as at generation.
            joined = leading_ids + self._tokenize(text)
            new = joined[len(ids) :] if joined[: len(ids)] == ids else self._tokenize(segment)
            target_length = self._length_to_end_of_turn(new) if target else 0
            ids += new
            is_target += [position < target_length for position in range(len(new))]
        return ids, is_target

    def _length_to_end_of_turn(self, ids: list[int]) -> int:
        """Counts the tokens up to an end-of-turn token that only white space follows, or all tokens."""
        end = len(ids)
        while end and str(self.tokenizer.decode(ids[end - 1])).isspace():
            end -= 1
        return end if end and ids[end - 1] in self.end_of_turn_ids else len(ids)

    def _terminate(self, ids: list[int], is_target: list[bool]) -> tuple[list[int], list[bool]]:
        """Ends the sequence at its last target, which is a token to stop at."""
        if True not in is_target:
            raise DataError("has no completion in what the chat template renders of it; correct the template.")
        end = len(is_target) - is_target[::-1].index(True)
        eos_token_id = self.tokenizer.eos_token_id
        stop_ids = self.end_of_turn_ids if self.use_chat_template else {eos_token_id}
        if ids[end - 1] in stop_ids:
            return ids[:end], is_target[:end]
        return [*ids[:end], eos_token_id], [*is_target[:end], True]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: list[Message], *, is_prompt: bool = False) -> str:
        return self._apply_template(messages, tokenize=False, add_generation_prompt=is_prompt)

    def _apply_template(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            raise DataError(f"is refused by the chat template ({str(error).rstrip('.')}); change its roles.") from error
