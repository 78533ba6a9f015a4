"""From records with images to texts: what the processor is given, and which of the tokens are answers.

Images are not needed here. How many tokens an image takes is known when the processor has seen it; until then it is one
token, and so the answers are found by counting from the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datasets import Features, List, Value
from typing_extensions import override

from na_lora_lightning.data.images.records import count_images, read_vision_conversation, text_of, with_image_parts
from na_lora_lightning.data.processors import image_token_of
from na_lora_lightning.data.text.chat import ChatTemplate, Piece
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.formats import Format, Record
from na_lora_lightning.data.text.loss_keys import last_answer, learned_spans
from na_lora_lightning.data.text.records import Message
from na_lora_lightning.errors import ConfigurationError, DataError

# The column that the encoder takes the number of a record's images from.
NUMBER_OF_IMAGES = "number_of_images"

_FEATURES = {
    "index": Value("int64"),
    "text": Value("string"),
    "text_ids": List(Value("int32")),
    "images": Value("int64"),
    "answer_starts": List(Value("int32")),
    "answer_ends": List(Value("int32")),
    "answer_prefixes": List(Value("int32")),
    "tokens": Value("int64"),
    "target_tokens": Value("int64"),
    "truncated": Value("bool"),
    "end_ids": List(Value("int32")),
}
_EVALUATION_FEATURES = {"prompt": Value("string"), "reference": Value("string")}
_BOS_IN_TEMPLATE = re.compile(r"\bbos_token\b")


class VisionRecordEncoder(RecordEncoder):
    """Turns a record into the text that a processor is given with the record's images.

    The loss is on every assistant turn, its end-of-turn token included. If nothing marks the end of the last turn, the
    end-of-sequence token is added. Without a chat template the text is one image token for each image, the prompt, and
    the completion, with nothing between them.

    A record's column ``number_of_images`` tells how many images it has.

    Args:
        processor: The processor.
        max_length: The largest number of tokens of a record.
        use_chat_template: Whether to render records with the processor's chat template; None stands for whenever there
            is one.
        system_prompt: The system message for records that have none.
        training_template: A chat template for conversations, in place of the processor's, which prompts have.

    Raises:
        ConfigurationError: The processor lacks what the other arguments need.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        use_chat_template: bool | None,
        system_prompt: str | None,
        training_template: str | None = None,
    ) -> None:
        self.processor = processor
        super().__init__(
            processor.tokenizer,
            max_length=max_length,
            loss_on="completion",
            use_chat_template=use_chat_template,
            system_prompt=system_prompt,
            training_template=training_template,
        )
        self.image_token = image_token_of(processor)
        template = self.template.text if self.use_chat_template else ""
        needs_bos = bool(self.leading_ids) and not _BOS_IN_TEMPLATE.search(template)
        needs_bos = needs_bos and str(self.tokenizer.bos_token) not in template
        ends_texts = self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]
        # Like transformers at inference: the tokenizer puts the token of the beginning, unless the template does.
        self.add_special_tokens = needs_bos and not ends_texts
        self.beginning = str(self.tokenizer.bos_token) if needs_bos and ends_texts else ""

    @staticmethod
    def features(*, evaluation: bool) -> Features:
        """Returns the columns of encoded records."""
        return Features({**_FEATURES, **(_EVALUATION_FEATURES if evaluation else {})})

    @override
    def _read(self, record: Record, form: Format) -> Record:
        read = super()._read(record, form)
        if form.name == "sharegpt" and isinstance(read["messages"], list):
            read["messages"] = [with_image_parts(turn) for turn in read["messages"]]
        return read

    @override
    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}]

    def _encode(self, record: Record, evaluation: bool, needs_completion: bool) -> dict[str, Any]:
        images = record.pop(NUMBER_OF_IMAGES)
        messages = read_vision_conversation(record, images, needs_completion=needs_completion)
        messages = self._conversation(record, messages)
        roles = [message["role"] for message in messages]
        is_open = not needs_completion and roles[-1] != "assistant"
        context = messages if is_open else messages[: last_answer(messages, self.loss_on)]
        kept = messages if is_open else messages[: len(roles) - roles[::-1].index("assistant")]
        text, ids, answers = self._encode_text(self._pieces(kept, is_open))
        used = count_images(kept)
        if text.count(self.image_token) != used:
            raise DataError(
                f"has {used} {'image' if used == 1 else 'images'} and {text.count(self.image_token)} image tokens "
                f"({self.image_token}) in what is made of its text; remove them from its texts, or use another chat "
                "template."
            )
        if len(ids) > self.max_length:
            raise DataError(
                f"has {len(ids)} tokens, with one for each image, more than max_length={self.max_length}; raise "
                "max_length or shorten it."
            )
        learned = answers if is_open else learned_spans(answers, kept, self.loss_on) or answers
        encoded: dict[str, Any] = {
            "text": text,
            "text_ids": ids,
            "images": used,
            "answer_starts": [start for start, _, _ in learned],
            "answer_ends": [end for _, end, _ in learned],
            "answer_prefixes": [prefix for _, _, prefix in learned],
            "tokens": len(ids),
            "target_tokens": sum(end - start for start, end, _ in learned),
            "truncated": False,
            "end_ids": self._ends_of(ids, [(start, stop) for start, stop, _ in answers]),
        }
        if evaluation:
            encoded["prompt"] = text_of(context[-1]["content"])
            encoded["reference"] = "" if is_open else self._reference(ids[slice(*learned[-1][:2])])
        return encoded

    @override
    def end_token_ids(self) -> list[int]:
        _, ids, answers = self._encode_text(self._pieces(self.template.question_and_answer(), is_open=False))
        return self._ends_of(ids, [(start, stop) for start, stop, _ in answers])

    def _pieces(self, messages: list[Message], is_open: bool) -> list[Piece]:
        """Splits the text of a record into prompts and answers."""
        if not self.use_chat_template:
            prompt, *completion = (text_of(message["content"]) for message in messages)
            images = self.image_token * count_images(messages)
            return [(self.beginning + images + prompt, False), *((text, True) for text in completion)]
        if is_open:
            pieces = [(self.template.render(messages, is_prompt=True), False)]
        else:
            pieces = list(self.template.pieces(messages))
        return [(self.beginning + pieces[0][0], pieces[0][1]), *pieces[1:]]

    def _encode_text(self, pieces: list[Piece]) -> tuple[str, list[int], list[tuple[int, int, int]]]:
        """Tokenises a text as a whole and finds the answers in it.

        Returns:
            The text, its tokens, and for each answer its first token, the token after its last one, and the length of
            the text up to its end.
        """
        while pieces and not pieces[-1][1] and len(pieces) > 1:
            # Templates can render something after the last answer, which no answer is learned from.
            pieces = pieces[:-1]
        text = "".join(piece for piece, _ in pieces)
        if pieces[-1][1]:
            text = self._ended(text)
        ids = self._tokenize(text)
        answers: list[tuple[int, int, int]] = []
        begin = 0
        for position, (piece, is_answer) in enumerate(pieces):
            end = len(text) if position == len(pieces) - 1 else begin + len(piece)
            if is_answer:
                prompt_ids = self._tokenize(text[:begin])
                if ids[: len(prompt_ids)] != prompt_ids:
                    raise DataError(
                        "has an answer whose first letters make one token with the end of its prompt "
                        f"({text[max(begin - 8, 0) : begin + 8]!r}), so that generation would begin elsewhere; "
                        "separate them by a space or a line break, or use another chat template."
                    )
                # A token across the border to the next turn is not part of the answer.
                length = _common_length(self._tokenize(text[:end]), ids)
                start = len(prompt_ids)
                stop = start + self._length_to_end_of_turn(ids[start:length])
                if stop == start:
                    raise DataError("has an answer without any token; give it a completion or remove the record.")
                self._require_one_end(ids[start:stop])
                answers.append((start, stop, end))
            begin = end
        return text, ids, answers

    def _ended(self, text: str) -> str:
        stripped = text.rstrip()
        last = self._tokenize(stripped)[-1:]
        return stripped if last and last[0] in self.stop_ids else text + str(self.tokenizer.eos_token)

    def locate_answers(
        self, row: dict[str, Any], ids: list[int], encode: Callable[[str, int], list[int]]
    ) -> list[tuple[int, int]]:
        """Finds the answers among the tokens that the processor made of a text and its images.

        Args:
            row: The encoded record.
            ids: The tokens, without padding.
            encode: Tokenises the beginning of the record's text with the first of its images, as the processor does.

        Returns:
            For each answer its first token and the token after its last one.

        Raises:
            DataError: The tokens are not those of the text. The message lacks its subject, which the caller knows.
        """
        found = []
        text, text_ids = row["text"], row["text_ids"]
        for start, end, prefix in zip(row["answer_starts"], row["answer_ends"], row["answer_prefixes"], strict=True):
            images = text.count(self.image_token, 0, prefix)
            if images == row["images"]:
                added = len(ids) - len(text_ids)
            else:
                # Images follow, so the tokens up to the answer have to be counted by themselves.
                added = len(encode(text[:prefix], images)) - len(self._tokenize(text[:prefix]))
            if ids[start + added : end + added] != text_ids[start:end]:
                raise DataError(
                    f"has an answer whose tokens {type(self.processor).__name__} changes when it puts its images among "
                    "them, so that they cannot be found; use another chat template, or use_chat_template: false."
                )
            found.append((start + added, end + added))
        return found

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self.add_special_tokens, verbose=False)["input_ids"]

    @override
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.processor, training=self.training_template)


def require_options_of(processor: Any, options: dict[str, Any]) -> None:
    """Refuses options that the image processor does not have.

    Raises:
        ConfigurationError: There is one.
    """
    known = sorted(set(getattr(getattr(processor.image_processor, "valid_kwargs", None), "__annotations__", ())))
    unknown = sorted(set(options) - set(known)) if known else []
    if unknown:
        raise ConfigurationError(
            f"image_options has {unknown[0]!r}, which {type(processor.image_processor).__name__} does not know; use "
            f"some of {', '.join(known)}."
        )


def _common_length(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
