"""A few odd data files and random combinations of options; ``python -m fuzz.data_files`` tries a thousand."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from fuzz.data_files import Figures, run
from fuzz.option_space import draw
from fuzz.options import fuzz


@pytest.fixture(autouse=True)
def _log_again() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def test_random_options_are_right_or_refused_in_one_sentence() -> None:
    outcomes = fuzz(10, seed=2)
    assert [outcome.text for outcome in outcomes if outcome.kind == "wrong"] == []
    checks = {check for outcome in outcomes for check in outcome.checks}
    assert checks >= {"held", "adapter"}


def test_a_combination_follows_from_its_number_and_seed() -> None:
    from pathlib import Path

    kinds = {"llama": "l", "gpt2": "g", "mixtral": "m"}
    first, again = (draw(5, 1, kinds, "data", Path("run")) for _ in range(2))
    assert first == again
    assert draw(6, 1, kinds, "data", Path("run")) != first


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_files_are_trained_on_to_the_letter_or_refused_in_one_sentence() -> None:
    figures = Figures()
    run(30, 0, figures)
    assert figures.files >= 30
    assert figures.accepted.total() >= 10
