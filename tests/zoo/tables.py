"""The outcomes of all model types as a table on the console and in the documentation."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from rich.table import Table
from zoo.check import Verdict

LONGEST = 300
TITLES = {
    "causal-lm": "Causal language models (`MODEL_FOR_CAUSAL_LM_MAPPING`)",
    "image-text-to-text": "Language side of image-text-to-text models (`MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING`)",
    "seq2seq": "Encoder-decoders and others for text from text (`MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING`)",
    "masked-lm": "Masked language models (`MODEL_FOR_MASKED_LM_MAPPING`)",
    "text-encoding": "Text encoders (`MODEL_FOR_TEXT_ENCODING_MAPPING`)",
    "image-classification": "Image classification (`MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING`)",
    "speech": "Speech (`MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING` and `MODEL_FOR_CTC_MAPPING`)",
    "diffusers": "Denoisers of diffusers",
}
HEAD = """\
# Model zoo

Every model type of these mappings of transformers, built tiny from its configuration, with LoRA on all linear layers
and stacked experts (of the language side). Made by `make zoo`; do not edit.

- *Sites*: gates found. *Experts*: the feed-forward networks behind them with each expert by itself, where there are
  any.
- *Rows right*: moving a row of `lora_B` (for stacked experts, the columns of one expert in it) changes exactly the
  pre-activation channel that it is said to make. Every feed-forward block of the plain model, found by watching its
  calls of activation functions, has a site, and no site lies elsewhere.
- *Trained*: in the second of two optimizer steps with both callbacks, exactly the rows of kept channels moved, bit for
  bit, and the statistics were of exactly the real tokens of each network.

"""


@dataclass(frozen=True)
class Outcome:
    """What came of one type: a verdict, the reason why it is not buildable, or an error."""

    mapping: str
    model_type: str
    verdict: Verdict | None = None
    not_buildable: str | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether everything is as it should be."""
        return self.verdict is not None and self.verdict.right

    @property
    def is_red(self) -> bool:
        """Whether something is wrong or unexplained."""
        return self.error is not None or (self.verdict is not None and bool(self.verdict.problems))

    @property
    def note(self) -> str:
        """Problems, or remarks, or reasons, in one line."""
        if self.verdict is None:
            return _line(self.not_buildable or self.error or "")
        if self.verdict.problems:
            more = len(self.verdict.problems) - 1
            return _line(self.verdict.problems[0]) + (f" (and {more} more)" if more else "")
        return self.verdict.refused or "; ".join(self.verdict.notes)

    @property
    def is_refused(self) -> bool:
        """Whether it is refused for a known reason."""
        return self.verdict is not None and self.verdict.refused is not None and not self.is_red


def buildable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that could be built."""
    return [outcome for outcome in outcomes if outcome.not_buildable is None]


def share_right(outcomes: Sequence[Outcome]) -> float:
    """Share of fully right types among the buildable ones."""
    built = buildable(outcomes)
    return sum(outcome.is_right for outcome in built) / len(built) if built else 1.0


def with_blocks(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The buildable ones that have feed-forward blocks of linear layers alone."""
    return [o for o in buildable(outcomes) if o.verdict is None or not o.verdict.nothing_to_find]


def summary(outcomes: Sequence[Outcome]) -> Table:
    """Counts by mapping, for the console."""
    table = Table("mapping", "types", "buildable", "fully right", "share", "refused", "red", "seconds")
    for mapping in dict.fromkeys(outcome.mapping for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.mapping == mapping]
        verdicts = [outcome.verdict for outcome in own if outcome.verdict is not None]
        table.add_row(
            mapping,
            str(len(own)),
            str(len(buildable(own))),
            str(sum(outcome.is_right for outcome in own)),
            f"{share_right(own):.1%}",
            str(sum(outcome.is_refused for outcome in own)),
            str(sum(outcome.is_red for outcome in own)),
            f"{sum(verdict.seconds for verdict in verdicts):.0f}",
        )
    return table


def document(outcomes: Sequence[Outcome], before: str = "") -> str:
    """The page of the documentation; sections of other mappings stay as they were ``before``."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [f"{HEAD}Python {platform.python_version()}, {versions}.\n"]
    kept = {part.split("\n", 1)[0]: f"## {part}" for part in before.split("\n## ")[1:]}
    for mapping, title in TITLES.items():
        own = [outcome for outcome in outcomes if outcome.mapping == mapping]
        if own:
            lines += _section(mapping, own)
        elif title in kept:
            lines += [kept[title].rstrip("\n"), ""]
    return "\n".join(lines)


def _section(mapping: str, outcomes: list[Outcome]) -> list[str]:
    right = sum(outcome.is_right for outcome in outcomes)
    refused = [outcome for outcome in outcomes if outcome.is_refused]
    missing = [outcome for outcome in outcomes if outcome.not_buildable is not None]
    red = [outcome for outcome in outcomes if outcome.is_red]
    found = with_blocks(outcomes)
    without = len(buildable(outcomes)) - len(found)
    lines = [
        f"## {TITLES[mapping]}\n",
        f"{len(outcomes)} types, {len(buildable(outcomes))} buildable, {right} of these fully right "
        f"({share_right(outcomes):.1%}), {len(refused)} refused for a reason, {len(red)} wrong or unexplained.\n",
    ]
    if mapping == "diffusers" and found:
        lines.append(f"Made with diffusers {version('diffusers')}; all of a model has LoRA.\n")
    if without:
        lines.append(
            f"{without} of the refused have no feed-forward block of linear layers alone, so that there is nothing to "
            f"find; of the other {len(found)}, {share_right(found):.1%} are right.\n"
        )
    for title, some in (("Refused", refused), ("Not buildable", missing), ("Wrong or unexplained", red)):
        if some:
            lines += [f"{title}:\n", *(f"- `{o.model_type}`: {_escaped(o.note).rstrip('.')}." for o in some), ""]
    lines += ["| type | sites | experts | activation | kind | rows right | trained | note |", "|---" * 8 + "|"]
    return [*lines, *(_row(outcome) for outcome in outcomes), ""]


def _row(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if verdict is None or verdict.refused is not None:
        state = (
            "refused" if outcome.is_refused else "not buildable" if outcome.not_buildable is not None else "**error**"
        )
        cells = [*[""] * 6, state]
    else:
        experts = str(verdict.networks) if verdict.networks != verdict.sites else ""
        marks = ["yes" if good else "**no**" for good in (verdict.rows_right, verdict.trained)]
        lists = [", ".join(verdict.activations), ", ".join(verdict.kinds)]
        cells = [str(verdict.sites), experts, *lists, *marks, _escaped(outcome.note)]
    return f"| {' | '.join([f'`{outcome.model_type}`', *cells])} |"


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _escaped(text: str) -> str:
    return _line(text).replace("|", "\\|")
