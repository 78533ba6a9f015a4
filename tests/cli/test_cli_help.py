"""The help of the command line: what users read has no markup, and what this package adds comes first."""

from __future__ import annotations

import re

import pytest

from na_lora_lightning.cli.help import plain
from na_lora_lightning.cli.main import main

MARKUP = re.compile(r"`|:(class|func|meth|attr|mod|ref|paramref):|~na_lora|c_R|d_ff")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that no text is broken where a pattern would look for it.
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "merge", "inspect"])
def test_no_markup_and_no_undefined_symbol(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 10
    assert [line for line in printed.splitlines() if MARKUP.search(line)] == []


def test_options_of_a_class_have_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data", "na_lora_lightning.data.VisionInstructionDataModule", "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if MARKUP.search(line)] == []


@pytest.mark.parametrize("command", ["fit", "test"])
def test_own_groups_come_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = [match[1] for line in lines if (match := re.fullmatch(r"\S.* \(([a-z_.]+)\):", line))]
    assert groups == [
        *("model", "model.lora", "model.schedule", "model.loss", "model.evaluation", "model.adapter", "data"),
        *("gate_importance", "gate_importance.variant", "gate_importance.observer"),
        *("step_scale", "step_scale.observer", "fit_summary", "checkpoint", command, "trainer"),
    ]
    # One line of usage instead of a hundred and fifty.
    assert lines[0] == f"usage: na-lora {command} [--config FILE] [--OPTION VALUE ...]"
    assert lines[1] == ""


def test_a_switch_stands_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    start, end = printed.index(" (step_scale):"), printed.index(" (step_scale.observer):")
    assert "--step_scale.enabled" in printed[start:end]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":class:`~a.b.Name` and :func:`a.b.f`", "Name and f"),
        (":paramref:`~lightning.pytorch.trainer.trainer.Trainer.callbacks`.", "callbacks."),
        (":ref:`the manual <manual>`", "the manual"),
        ('``"targets"`` of ``a`` or `b`', '"targets" of a or b'),
        ("`Notes <https://x.org/a_b>`_.", "Notes (https://x.org/a_b)."),
        ("no `` pair, no_markup", "no `` pair, no_markup"),
        (None, None),
    ],
)
def test_plain_text_of_markup(text: str | None, expected: str | None) -> None:
    assert plain(text) == expected
