"""Some odd data files; ``python -m fuzz.data_files`` tries a thousand."""

from __future__ import annotations

import pytest
from fuzz.data_files import Figures, run


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_files_are_trained_on_to_the_letter_or_refused_in_one_sentence() -> None:
    figures = Figures()
    run(30, 0, figures)
    assert figures.files >= 30
    assert figures.accepted.total() >= 10
