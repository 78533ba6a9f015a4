"""The help of the commands: options of this package before those of the trainer, without markup."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import ArgumentParser
from typing_extensions import override

DESCRIPTIONS = {
    "fit": "Trains a LoRA adapter; both mechanisms are on unless switched off.",
    "validate": "Measures loss, perplexity and exact match on the validation data.",
    "test": "Measures loss, perplexity and exact match on the test data.",
    "predict": "Generates answers to prompts.",
}
# Groups whose titles come from docstrings of Lightning's.
_TITLES = {"trainer": "Lightning's Trainer", **dict.fromkeys(DESCRIPTIONS, "The checkpoint to start from")}
# Of docstrings: a role such as :class:`~package.module.Name`, and a literal.
_ROLE = re.compile(r":[\w:]+:`~?(?:[\w.]+\.)?([^`<]+?)(?:\s*<[^`>]*>)?`", re.ASCII)
_LITERAL = re.compile(r"``(.+?)``|`([^`<]+?)(?:\s*<([^`>]*)>)?`_{0,2}", re.DOTALL)


class PlainParser(ArgumentParser):
    """A parser whose help can be read in a terminal."""

    @override
    def format_help(self, *arguments: Any, **options: Any) -> str:
        """Puts the groups of options in order and takes the markup out of all texts."""
        groups = self.groups or {}
        for name, group in groups.items():
            title = _TITLES.get(name) or " ".join((plain(group.title) or "").split())
            group.title = f"{title.removesuffix(f' ({name})')} ({name})"
        for action in self._actions:
            action.help = plain(action.help)
        # A stable order, so that those of the trainer go last and all others stay.
        self._action_groups = sorted(self._action_groups, key=lambda group: group is groups.get("trainer"))
        text: str = super().format_help(*arguments, **options)
        return text


def plain(text: str | None) -> str | None:
    """Text without the markup of Sphinx: of a role the last part of its name, of a literal what is in it."""
    if not text:
        return text
    return _LITERAL.sub(
        lambda match: match[1] or match[2] + (f" ({match[3]})" if match[3] else ""),
        _ROLE.sub(r"\1", text),
    )
