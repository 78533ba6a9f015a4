from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from module_helpers import END, saved_model, some_batches, tiny_tokenizer

from na_lora_lightning.arguments import EvaluationOptions, LoRAOptions
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.modules.evaluation import (
    EvaluatedAnswer,
    EvaluationMetrics,
    Evaluator,
    generate_answers,
    is_contained,
    is_exact_match,
    prompt_inputs,
)
from na_lora_lightning.modules.losses import TokenSums

LAST_NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    source = BaseModelSource(saved_model(tmp_path))
    return add_lora(load_base_model(source, torch.device("cpu")), LoRAOptions(r=2), source).eval()


def greedy(model: Any, prompt: torch.Tensor, steps: int) -> list[int]:
    """Decodes one prompt without padding or cache."""
    tokens = prompt[None]
    for _ in range(steps):
        next_token = model(input_ids=tokens).logits[0, -1].argmax()
        if int(next_token) == END:
            break
        tokens = torch.cat([tokens, next_token.view(1, 1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("answer", "reference", "options", "expected"),
    [
        (" 42\n", "42", {}, True),
        ("a  b\nc", "a b c", {}, True),
        ("42.", "42", {}, False),
        ("Yes", "yes", {}, False),
        ("Yes", "yes", {"ignore_case": True}, True),
        ("3 plus 4 is 7", "7", {"answer_pattern": LAST_NUMBER}, True),
        ("3 plus 4 is 8", "7", {"answer_pattern": LAST_NUMBER}, False),
        ("it is 7", "3+4 #### 7", {"answer_pattern": r"####\s*(\S+)"}, False),
        ("so #### 7 ", "3+4 #### 7", {"answer_pattern": r"####\s*(\S+)"}, True),
        ("none", "none", {"answer_pattern": LAST_NUMBER}, False),
        ("", "", {}, True),
    ],
)
def test_exact_match(answer: str, reference: str, options: dict[str, Any], expected: bool) -> None:
    assert is_exact_match(answer, reference, EvaluationOptions(**options)) is expected


@pytest.mark.parametrize(
    ("answer", "reference", "options", "expected"),
    [
        ("Mary has 6 sisters, so it is 6.", "6", {}, True),
        ("It is 16, or 60, or 6.5, or 1,6, or -6, or \u22126, or x6.", "6", {}, False),
        ("(6)", "6", {}, True),
        ("3-6", "6", {}, True),
        ("It is Paris!", "paris", {}, False),
        ("It is\nnew  York!", "New York", {"ignore_case": True}, True),
        ("Parisian", "Paris", {}, False),
        ("答案是北京。", "北京", {}, True),
        ("It is 7 and no 8", "3+4 #### 7", {"answer_pattern": r"####\s*(\S+)"}, True),
        ("C++ it is", "C++", {}, True),
        ("a+b", "a.b", {}, False),
        ("anything", "", {}, False),
        ("", "", {}, True),
        ("x", "none", {"answer_pattern": LAST_NUMBER}, False),
    ],
)
def test_contains_match(answer: str, reference: str, options: dict[str, Any], expected: bool) -> None:
    assert is_contained(answer, reference, EvaluationOptions(**options)) is expected


@given(st.text(max_size=8), st.text(max_size=8), st.booleans())
def test_an_answer_that_is_equal_contains_it(answer: str, reference: str, ignore_case: bool) -> None:
    options = EvaluationOptions(ignore_case=ignore_case)
    assert is_contained(answer, answer, options)
    assert is_contained(answer, reference, options) >= is_exact_match(answer, reference, options)
    if reference.strip():
        assert is_contained(f"{answer} {reference} .", reference, options)


def sums(loss: float, targets: int, correct: int) -> TokenSums:
    return TokenSums(torch.tensor(loss), torch.tensor(targets), torch.tensor(correct))


def test_metrics_weigh_tokens_and_answers_alike() -> None:
    metrics = EvaluationMetrics()
    right, wrong = (EvaluatedAnswer("p", "r", "a", correct, True) for correct in (True, False))
    metrics.update(sums(6.0, 2, 1), [right])
    metrics.update(sums(4.0, 8, 6), [wrong, wrong, right])
    metrics.update(sums(0.0, 0, 0), [EvaluatedAnswer("p", "r", "a", False)] * 4)
    computed = {name: float(value) for name, value in metrics.compute().items()}
    assert computed == pytest.approx(
        {
            "loss": 1.0,
            "perplexity": math.e,
            "token_accuracy": 0.7,
            "exact_match": 0.25,
            "contains_match": 0.5,
        },
        rel=1e-6,
    )
    metrics.reset()
    metrics.update(sums(0.0, 0, 0))
    assert metrics.compute() == {}


def test_metrics_of_two_processes_are_those_of_one() -> None:
    first, second, whole = EvaluationMetrics(), EvaluationMetrics(), EvaluationMetrics()
    for parts in ((first, sums(6.0, 2, 1)), (second, sums(4.0, 8, 6))):
        parts[0].update(parts[1])
        whole.update(parts[1])
    # What torchmetrics does with states that are gathered from processes.
    gathered = {
        name: reduction(torch.stack([getattr(first, name), getattr(second, name)]))
        for name, reduction in whole._reductions.items()
        if reduction is not None
    }
    assert {name: float(value) for name, value in gathered.items()} == {
        name: float(getattr(whole, name)) for name in gathered
    }
    assert len(gathered) == 6


def test_padded_batches_generate_as_single_prompts_do(model: Any) -> None:
    batch = some_batches(1, rows=3)[0]
    with torch.no_grad():
        expected = [
            greedy(model, tokens[mask.bool()], 5)
            for tokens, mask in zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True)
        ]
    tokenizer = tiny_tokenizer()
    arguments = EvaluationOptions(max_new_tokens=5)
    texts = generate_answers(model, tokenizer, prompt_inputs(batch), arguments)
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]


def test_generation_is_greedy_whatever_the_models_settings(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    batch = some_batches(1, rows=3)[0]
    prompts = prompt_inputs(batch)
    arguments = EvaluationOptions(max_new_tokens=5)
    expected = generate_answers(model, tiny_tokenizer(), prompts, arguments)
    own = model.get_base_model().generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k, own.repetition_penalty = True, 0.7, 0.5, 3, 1.5
    own.max_length = 7
    for _ in range(3):
        assert generate_answers(model, tiny_tokenizer(), prompts, arguments) == expected
    assert caplog.text == ""


def test_generation_ends_at_the_tokenizers_end(model: Any) -> None:
    batch = some_batches(1, rows=1)[0]
    prompts = prompt_inputs(batch)
    tokenizer = tiny_tokenizer()
    text = generate_answers(model, tokenizer, prompts, EvaluationOptions(max_new_tokens=5))[0]
    token = tokenizer(text)["input_ids"][2]
    # A chat model's end of turn, which its generation settings do not know.
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(token)})
    shorter = generate_answers(model, tokenizer, prompts, EvaluationOptions(max_new_tokens=5))[0]
    # The fixture's text repeats no token before its third.
    assert shorter == text[:2]


def test_evaluator_shares_the_sample_among_processes(model: Any) -> None:
    evaluator = Evaluator(EvaluationOptions(generate=True, max_new_tokens=1, sample_count=5))
    for batch in some_batches(3, rows=2):
        evaluator.add(model, batch, tiny_tokenizer(), processes=2)
    assert len(evaluator.answers) == int(evaluator.metrics.answers) == 3
    evaluator.begin()
    assert evaluator.answers == []
    assert int(evaluator.metrics.answers) == 0
