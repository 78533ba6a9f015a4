"""The history of a run: what counts of it after kills and resumes, and while it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from na_lora_lightning.history import FILE, HistoryWriter, read_history


def test_numbers_are_short_and_texts_of_any_kind_are_kept(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "run")
    values = {"loss": 1.23456789, "nan": math.nan, "infinite": math.inf, "large": 135_000_000.0, "count": 7}
    writer.write("validation", 3, metrics=values, samples=[{"answer": "<b>é\ud800\n\u2028"}])
    history = read_history(tmp_path / "run")
    assert history is not None
    (entry,) = history.validations
    assert entry["metrics"] == {"loss": 1.2346, "nan": None, "infinite": None, "large": 135_000_000.0, "count": 7}
    assert entry["samples"] == [{"answer": "<b>é\ud800\n\u2028"}]
    assert (tmp_path / "run" / FILE).read_bytes().count(b"\n") == 1


def test_no_folder_no_file_and_no_line_that_counts(tmp_path: Path) -> None:
    assert read_history(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_text('[]\nnull\n{"type": "step"}\n{"type": 1, "step": 2}\nno JSON\n\n')
    history = read_history(tmp_path)
    assert history is not None
    assert (history.starts, history.steps, history.last_step) == ([], [], 0)


@given(cut=st.integers(0, 10_000), resumed_from=st.integers(0, 5))
def test_a_run_killed_anywhere_and_resumed_reads_like_one_that_was_not(
    tmp_path_factory: Any, cut: int, resumed_from: int
) -> None:
    """Whatever of the first part was lost, the second repeats every step after the checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    writer = HistoryWriter(folder)
    writer.write("start", 0, sites=[])
    for step in range(1, 6):
        writer.write("step", step, metrics={"loss": float(step)})
    writer.write("validation", 5, metrics={"validation/loss": 5.0})
    content = writer.path.read_bytes()
    head = content.index(b"\n") + 1
    lines = content.split(b"\n")
    # A kill loses nothing of what was written before the checkpoint.
    kept = len(b"\n".join(lines[: resumed_from + 1])) + 1
    writer.path.write_bytes(content[: max(head, kept, len(content) - cut)])
    torn = read_history(folder)
    assert torn is not None
    assert [entry["step"] for entry in torn.steps] == list(range(1, len(torn.steps) + 1))
    writer.write("start", resumed_from, sites=[])
    for step in range(resumed_from + 1, 9):
        writer.write("step", step, metrics={"loss": float(step)})
    writer.write("end", 8, outcome="ended")
    history = read_history(folder)
    assert history is not None
    assert [(entry["step"], entry["metrics"]["loss"]) for entry in history.steps] == [
        (n, float(n)) for n in range(1, 9)
    ]
    assert len(history.starts) == 2
    assert history.end is not None
    assert history.last_step == 8
    for line in writer.path.read_bytes().splitlines():
        if line.startswith(b'{"type":"start"'):
            assert json.loads(line)["sites"] == []


def test_a_new_run_in_the_same_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path)
    writer.write("start", 0)
    writer.write("step", 4, metrics={})
    writer.write("end", 4, outcome="ended")
    writer.write("start", 0)
    history = read_history(tmp_path)
    assert history is not None
    assert history.steps == []
    assert history.end is None
