"""Validation and test: token-weighted metrics, generated answers and exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from na_lora_lightning.arguments import EvaluationOptions
from na_lora_lightning.data.answers import answer_text, as_list
from na_lora_lightning.modules.losses import TokenSums, token_sums

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


# Enough to look at; the texts of a whole data set would only take memory.
_RECORDED_ANSWERS = 100


@dataclass(frozen=True)
class EvaluatedAnswer:
    """A generated answer beside what it should have been.

    Attributes:
        prompt: The prompt as text.
        reference: The right answer.
        answer: What the model generated.
        correct: Whether the two are equal, as :func:`is_exact_match` defines it.
        found: Whether the right answer is in it, as :func:`is_contained` defines it.
    """

    prompt: str
    reference: str
    answer: str
    correct: bool
    found: bool = False


class EvaluationMetrics(Metric):
    """Sums over all batches and processes, from which the means follow; batches of any size weigh rightly.

    ``compute`` returns ``loss`` (mean nats per target token), ``perplexity`` (its exponential), ``token_accuracy``
    (fraction of target tokens that the model finds most likely, given the tokens before) and, if answers were
    generated, ``exact_match`` (fraction of them that equal their reference) and ``contains_match`` (that contain it).
    """

    full_state_update = False
    higher_is_better = None

    negative_log_likelihood: Tensor
    target_tokens: Tensor
    correct_tokens: Tensor
    answers: Tensor
    correct_answers: Tensor
    found_answers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("negative_log_likelihood", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        for name in ("target_tokens", "correct_tokens", "answers", "correct_answers", "found_answers"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, sums: TokenSums, answers: Sequence[EvaluatedAnswer] = ()) -> None:
        """Adds a batch."""
        self.negative_log_likelihood += sums.negative_log_likelihood.detach()
        self.target_tokens += sums.target_tokens
        if sums.correct_tokens is not None:
            self.correct_tokens += sums.correct_tokens
        self.answers += len(answers)
        self.correct_answers += sum(answer.correct for answer in answers)
        self.found_answers += sum(answer.found for answer in answers)

    def compute(self) -> dict[str, Tensor]:
        """The means over everything since the last reset; scalars, float32. Without targets or answers, fewer."""
        metrics: dict[str, Tensor] = {}
        if self.target_tokens > 0:
            metrics["loss"] = self.negative_log_likelihood / self.target_tokens
            metrics["perplexity"] = metrics["loss"].exp()
            metrics["token_accuracy"] = self.correct_tokens / self.target_tokens
        if self.answers > 0:
            metrics["exact_match"] = self.correct_answers / self.answers
            metrics["contains_match"] = self.found_answers / self.answers
        return metrics


def normalise_answer(text: str, arguments: EvaluationOptions) -> str:
    """What of a text is compared: the part that ``answer_pattern`` finds, with runs of white space made one space.

    Args:
        text: An answer or a reference.
        arguments: ``answer_pattern`` and ``ignore_case``.

    Returns:
        The part; the empty string if the pattern finds none.
    """
    if arguments.answer_pattern is not None:
        matches = list(re.finditer(arguments.answer_pattern, text))
        if not matches:
            return ""
        last = matches[-1]
        text = (last.group(1) or "") if last.re.groups else last.group()
    text = " ".join(text.split())
    return text.casefold() if arguments.ignore_case else text


def is_exact_match(answer: str, reference: str, arguments: EvaluationOptions) -> bool:
    """Whether an answer equals its reference after :func:`normalise_answer`; one in which it finds nothing does not."""
    normalised = normalise_answer(answer, arguments)
    if not normalised and arguments.answer_pattern is not None:
        return False
    return normalised == normalise_answer(reference, arguments)


def is_contained(answer: str, reference: str, arguments: EvaluationOptions) -> bool:
    """Whether the right answer is somewhere in an answer, as a word or a number of its own.

    A model that has not learnt the form of the answers can so be compared with one that has. A 6 is neither in 16 nor
    in -6 or 6.5.

    Args:
        answer: Any text.
        reference: The right answer, of which ``answer_pattern`` takes a part where it is given.
        arguments: ``answer_pattern`` and ``ignore_case``.
    """
    wanted = normalise_answer(reference, arguments)
    if not wanted or is_exact_match(answer, reference, arguments):
        return is_exact_match(answer, reference, arguments)
    text = normalise_answer(answer, replace(arguments, answer_pattern=None))
    before = after = ""
    if _has_words(wanted[0]):
        before = r"(?<!\w)(?<!\d[.,])"
        if wanted[0].isdigit():
            before += r"(?<!(?<![\w)])[-\u2212])"
    if _has_words(wanted[-1]):
        after = r"(?!\w)(?![.,]\d)"
    return re.search(before + re.escape(wanted) + after, text) is not None


def _has_words(letter: str) -> bool:
    """Whether a letter or digit is of a script with spaces between words, which are those before Thai in Unicode."""
    return letter.isalnum() and letter < "\u0e00"


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    arguments: EvaluationOptions,
) -> list[str]:
    """Continues prompts deterministically, by greedy or beam search.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        inputs: ``input_ids`` ``[batch, length]``, int64, padded on the left, ``attention_mask`` ``[batch, length]``,
            0 on padding, and what the model takes of images.
        arguments: ``max_new_tokens`` and ``num_beams``.

    Returns:
        The text after each prompt up to a token that ends answers (of the model's generation settings, or the
        tokenizer's end of the sequence), without special tokens.
    """
    from transformers import GenerationConfig

    if len(inputs["input_ids"]) == 0:
        # All records of a batch were left out.
        return []
    base: Any = model.get_base_model()
    own = base.generation_config
    ends = as_list(getattr(own, "eos_token_id", None))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        # Chat models often end a turn with a token that their generation settings leave out.
        ends = [*ends, tokenizer.eos_token_id]
    # The model's own settings would be merged into whatever is passed to generate, sampling and penalties included.
    base.generation_config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=ends or None,
        bos_token_id=getattr(own, "bos_token_id", None),
    )
    try:
        generated: Any = model.generate(**inputs)
    finally:
        base.generation_config = own
    answers: list[list[int]] = generated[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer_text(tokenizer, answer, ends) for answer in answers]


def prompt_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The model's inputs to continue the prompts of a batch: its tensors named ``prompt_…``, without that."""
    prefix = "prompt_"
    return {
        name.removeprefix(prefix): value
        for name, value in batch.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def _first(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first records of a batch; a batch with images stays whole, as they are not laid out record by record."""
    if set(inputs) != {"input_ids", "attention_mask"}:
        return dict(inputs)
    return {name: value[:count] for name, value in inputs.items()}


class Evaluator(nn.Module):
    """Evaluates a model batch by batch; a module so that its sums follow the model to its device.

    Args:
        arguments: What to measure.

    Attributes:
        metrics: The sums of this evaluation.
        answers: The first hundred generated answers of this process.
    """

    def __init__(self, arguments: EvaluationOptions) -> None:
        super().__init__()
        self.arguments = arguments
        self.metrics = EvaluationMetrics()
        self.answers: list[EvaluatedAnswer] = []
        self._generated = 0

    def begin(self) -> None:
        """Forgets the last evaluation."""
        self.metrics.reset()
        self.answers = []
        self._generated = 0

    @torch.no_grad()
    def add(
        self,
        model: PeftModel,
        batch: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        processes: int = 1,
    ) -> None:
        """Adds a batch to the metrics, and generates answers to its prompts if that is wanted.

        Args:
            model: In evaluation mode.
            batch: As :class:`~na_lora_lightning.modules.language.NALoRALightningModule` takes it.
            tokenizer: Needed to generate.
            processes: Number of processes that share the data, and so ``sample_count``.
        """
        sums = token_sums(model, batch)
        answers = [] if tokenizer is None else self._answer(model, batch, tokenizer, processes)
        self.metrics.update(sums, answers)
        self.answers += answers[: _RECORDED_ANSWERS - len(self.answers)]

    def _answer(
        self, model: PeftModel, batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, processes: int
    ) -> list[EvaluatedAnswer]:
        count = len(batch["prompt_input_ids"])
        if self.arguments.sample_count is not None:
            share = -(-self.arguments.sample_count // processes)
            count = min(count, share - self._generated)
        if count <= 0:
            return []
        self._generated += count
        texts = generate_answers(
            model,
            tokenizer,
            _first(prompt_inputs(batch), count),
            self.arguments,
        )[:count]
        return [
            EvaluatedAnswer(
                prompt,
                reference,
                text,
                is_exact_match(text, reference, self.arguments),
                is_contained(text, reference, self.arguments),
            )
            for prompt, reference, text in zip(
                batch["prompts"][:count], batch["references"][:count], texts, strict=True
            )
        ]
