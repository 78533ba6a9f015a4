"""Chat templates: conversations as text, and which of it are answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from na_lora_lightning.data.answers import added_tokens, end_mark
from na_lora_lightning.data.text.records import Message
from na_lora_lightning.errors import DataError

# Annotated as if it returned the text alone.
_render_jinja_template: Any = render_jinja_template
_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# No template says this by itself.
_ANY_TEXT = "qzx"

Piece = tuple[str, bool]

# What goes wrong inside a template that was not made for what it is given.
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """The chat template of a tokenizer or of a processor.

    Args:
        tokenizer: The tokenizer.
        processor: The processor, if it is to render; its messages have lists of parts for contents.
        options: What the template is given besides messages, such as ``tools``.
        training: A template that conversations are rendered with in place of the one that prompts are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: Any = None,
        options: Mapping[str, Any] | None = None,
        training: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.options = dict(options or {})
        self.training = training

    def with_options(self, options: Mapping[str, Any]) -> ChatTemplate:
        """The template with what it is given for one record."""
        return ChatTemplate(self.tokenizer, self.processor, {**self.options, **options}, self.training)

    @property
    def text(self) -> str:
        """The template of conversations."""
        return self.training or self.tokenizer.get_chat_template(tools=self.options.get("tools"))

    @property
    def marks_answers(self) -> bool:
        """Whether it marks answers with ``{% generation %}``."""
        return bool(_GENERATION_MARKER.search(self.text))

    def question_and_answer(self) -> list[Message]:
        """A conversation that says nothing."""
        content: Any = _ANY_TEXT if self.processor is None else [{"type": "text", "text": _ANY_TEXT}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    def end_of_turn(self) -> str:
        """The token that it puts behind an answer; the empty string if it puts something else there, or nothing."""
        try:
            rendered = self.render(self.question_and_answer())
        except DataError:
            return ""
        return end_mark(self.tokenizer, rendered.rpartition(_ANY_TEXT)[2]).strip()

    def render(self, messages: list[Message], *, is_prompt: bool = False) -> str:
        """Renders a conversation, with the beginning of the next answer if it is a prompt.

        Raises:
            DataError: The template refuses it. The message lacks its subject, which the caller knows.
        """
        owner: Any = self.tokenizer if self.processor is None else self.processor
        options = {"tokenize": False, "add_generation_prompt": is_prompt, **self.options}
        if self.training is not None and not is_prompt:
            options["chat_template"] = self.training
        with _explained():
            return str(owner.apply_chat_template(messages, **options))

    def pieces(self, messages: list[Message]) -> Iterator[Piece]:
        """Splits a rendered conversation into answers and the text between them; tells which are answers.

        Raises:
            DataError: The template refuses it, or its answers cannot be told from the rest.
        """
        return self._marked_pieces(messages) if self.marks_answers else self._added_pieces(messages)

    def _added_pieces(self, messages: list[Message]) -> Iterator[Piece]:
        """An answer is what its turn adds to the rendering of the turns before it.

        That holds only for templates whose rendering of a conversation begins with that of its first turns, which is
        why it is checked.
        """
        end = 0
        complete = self.render(messages)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:turn], is_prompt=True)
            answered = self.render(messages[: turn + 1])
            if not (complete.startswith(answered) and answered.startswith(prompt) and len(prompt) >= end):
                raise DataError(
                    f"has an answer (message {turn + 1}) that the chat template renders differently with and "
                    "without the turns around it, so that its tokens cannot be told from the others; set "
                    "chat_template to 'training' for TRL's version of it, or to a file with {% generation %} markers."
                )
            yield prompt[end:], False
            yield answered[len(prompt) :], True
            end = len(answered)
        if end < len(complete):
            yield complete[end:], False

    def _marked_pieces(self, messages: list[Message]) -> Iterator[Piece]:
        """An answer is what the template marks, and what ends its turn: some templates mark the text alone.

        How a turn ends shows after the last answer, where no other turn follows.
        """
        complete, spans = self._render_marked(messages)
        answered = len(messages) - [message["role"] for message in messages][::-1].index("assistant")
        closed, closed_spans = (complete, spans)
        if answered < len(messages):
            closed, closed_spans = self._render_marked(messages[:answered])
        mark = end_mark(self.tokenizer, closed[closed_spans[-1][1] :]) if closed_spans else ""
        end = 0
        for start, stop in spans:
            yield complete[end:start], False
            end = stop + len(mark) if complete.startswith(mark, stop) else stop
            yield complete[start:end], True
        if end < len(complete):
            yield complete[end:], False

    def _render_marked(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        # transformers itself maps these characters to tokens, but a last character of several tokens to its first.
        with _explained():
            texts, spans = _render_jinja_template(
                conversations=[messages],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        text, joined = texts[0], list[tuple[int, int]]()
        for start, stop in spans[0]:
            if joined and start == joined[-1][1] and not text[:start].rstrip().endswith(added_tokens(self.tokenizer)):
                # One answer, marked in parts.
                joined[-1] = (joined[-1][0], stop)
            elif start < stop:
                joined.append((start, stop))
        return text, joined


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"is refused by the chat template ({reason}); change its roles or contents.") from error
