"""A picture of held-out questions with what was answered before and after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from digits import KINDS, Question
from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 5
_DIGIT, _GAP = 88, 10
_CELL = 2 * _DIGIT + 3 * _GAP, 168
_TITLE = 44
_BACKGROUND, _PAPER, _INK, _GREY = "#f3f4f6", "#ffffff", "#111827", "#6b7280"
_RIGHT, _WRONG = "#15803d", "#b91c1c"
_LONGEST = 7


def draw_answers(
    path: Path,
    folder: Path,
    questions: Sequence[Question],
    before: Sequence[str],
    after: Sequence[str],
    title: str,
) -> None:
    """Draw the first questions of each kind, one kind in a row, and write the picture.

    Args:
        path: File to write; it appears complete or not at all.
        folder: Folder of the images.
        questions: The questions.
        before: An answer to each, before fine-tuning.
        after: An answer to each, after it.
        title: Line above the picture.
    """
    width, height = _CELL
    canvas = Image.new(
        "RGB",
        (_COLUMNS * (width + _GAP) + _GAP, len(KINDS) * (height + _GAP) + _TITLE + _GAP),
        _BACKGROUND,
    )
    ImageDraw.Draw(canvas).text((_GAP, 12), title, fill=_INK, font=ImageFont.load_default(18))
    for row, kind in enumerate(KINDS):
        of_kind = [number for number, question in enumerate(questions) if question.kind == kind]
        for column, number in enumerate(of_kind[:_COLUMNS]):
            cell = _cell(folder, questions[number], before[number], after[number])
            canvas.paste(cell, (_GAP + column * (width + _GAP), _TITLE + row * (height + _GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    canvas.save(partial, format="PNG")
    os.replace(partial, path)


def _cell(folder: Path, question: Question, before: str, after: str) -> Image.Image:
    cell = Image.new("RGB", _CELL, _PAPER)
    used = len(question.images) * (_DIGIT + _GAP) - _GAP
    left = (_CELL[0] - used) // 2
    for position, name in enumerate(question.images):
        with Image.open(folder / name) as image:
            digit = image.resize((_DIGIT, _DIGIT), Image.Resampling.NEAREST)
        cell.paste(digit, (left + position * (_DIGIT + _GAP), _GAP))
    draw = ImageDraw.Draw(cell)
    line = _DIGIT + 2 * _GAP
    draw.text((_GAP, line), f"{question.prompt}  {question.completion}", fill=_INK, font=ImageFont.load_default(16))
    font = ImageFont.load_default(14)
    place = _GAP
    for label, answer in (("before ", before), ("   after ", after)):
        draw.text((place, line + 26), label, fill=_GREY, font=font)
        place += int(draw.textlength(label, font=font))
        shown = _shortened(answer)
        color = _RIGHT if answer.strip() == question.completion else _WRONG
        draw.text((place, line + 26), shown, fill=color, font=font)
        place += int(draw.textlength(shown, font=font))
    return cell


def _shortened(answer: str) -> str:
    """An answer in one short line of characters that the font has."""
    text = " ".join(answer.split()).encode("ascii", "replace").decode() or "(nothing)"
    return text if len(text) <= _LONGEST + 2 else text[: _LONGEST - 1] + "..."
