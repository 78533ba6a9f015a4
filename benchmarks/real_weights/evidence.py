"""The comparison on real weights as text and figures, from the ``cells.csv`` of ``na-lora compare`` alone.

``python -m benchmarks.real_weights.evidence NAME.csv ...`` takes exports into ``results/`` and writes the pages of
evidence; without arguments it writes them from what is there. A file is a comparison, and may be of part of one.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.real_weights.curves import at_equal_loss, draw
from na_lora_lightning.compare.grid import ScoredCell
from na_lora_lightning.compare.page import interval, number, signed
from na_lora_lightning.compare.plan import Cell, Plan
from na_lora_lightning.compare.results import Row, Table, common_tables, missing, tuned_table

RESULTS = Path(__file__).with_name("results")
BASELINE, MARGIN = "lora", 0.5
_WORDS = ("task", "arm", "device")
Verdict = Literal["supported", "not", "open"]


class Claim(NamedTuple):
    """What a hypothesis predicts of one arm: the change of test loss against another, in per cent.

    ``within`` has to hold the whole 90 % interval; otherwise the 95 % interval has to lie on the predicted side of 0.
    """

    arm: str
    low: float
    high: float
    against: str = BASELINE
    within: bool = False
    task: str | None = None


def _equal(*arms: str, against: str = BASELINE) -> list[Claim]:
    return [Claim(arm, -MARGIN, MARGIN, against, within=True) for arm in arms]


HYPOTHESES: dict[str, tuple[str, list[Claim]]] = {
    "R1": ("The defaults cost nothing", _equal("na_lora")),
    "R2": ("The plain reading does not pay", [Claim("plain_reading", 0.2, 2.0)]),
    "R3": ("Which channels are held does not matter", _equal("random_mask", "reversed_mask", against="na_lora")),
    "R4": ("What is a rate is tuned away", _equal("short_step", "rslora")),
    "R5": ("DoRA's gain was its models'", _equal("dora")),
    "R6": (
        "LoRA+ depends on the task",
        [Claim("lora_plus", -math.inf, 0.0, task="riddles"), Claim("lora_plus", -MARGIN, math.inf, within=True)],
    ),
    "R7": (
        "Masking gradients is masking updates",
        _equal("m1_selection", "m1_output", "m1_above_mean", against="m1_random"),
    ),
    "R8": (
        "Change is no better a name for importance",
        [Claim(arm, 0.2, 2.0) for arm in ("m2_change", "m2_drift", "m3")]
        + _equal("m2_drift", "m3", against="m2_change")
        + _equal("m3", against="m2_drift"),
    ),
    "R9": (
        "A masked forward pass costs most",
        [Claim("m4_selection", 0.0, math.inf), Claim("m4_selection", 0.0, math.inf, "m1_selection")],
    ),
    "R10": ("Dropping tokens costs", [Claim("m6", 0.0, math.inf)]),
    "R11": ("Step scales are rates", _equal("s1", "s2", "s3")),
    "R14": ("The step scale that the abstract names costs nothing", _equal("activation_scale", against="na_lora")),
}
_SHORTENING = ("short_step", "plain_reading", "s2")


class Export:
    """A comparison as its ``cells.csv`` has it.

    Args:
        file: The export.

    Attributes:
        cells: Its fits.
        plan: What of the comparison can be told from them.
    """

    def __init__(self, file: Path) -> None:
        with file.open(encoding="utf-8", newline="") as lines:
            self.cells = sorted((_scored(line) for line in csv.DictReader(lines)), key=lambda entry: entry.cell)
        found = [entry.cell for entry in self.cells]
        arms = {cell.arm for cell in found}
        series = {(cell.task, cell.arm) for cell in found}
        at = {rate: {(c.task, c.arm) for c in found if c.rate == rate} for rate in {cell.rate for cell in found}}
        # Rates that were added for some arms are not of the grid.
        rates = [rate for rate, those in at.items() if 2 * len(those) >= len(series)]
        self.name = file.stem
        self.arms = [BASELINE, *sorted(arms - {BASELINE})]
        self.plan = Plan(
            base={},
            tasks={task: {} for task in dict.fromkeys(cell.task for cell in found)},
            # One that has no cell yet stands for the second arm that every plan has.
            arms={arm: {} for arm in (self.arms if len(self.arms) > 1 else [BASELINE, "na_lora"])},
            rates=tuple(sorted(rates)) or (1.0,),
            seeds=max((cell.seed for cell in found), default=0) + 1,
        )
        self.tuned = tuned_table(self.cells, self.plan, MARGIN)
        self.common = common_tables(self.cells, self.plan, MARGIN)

    def row(self, claim: Claim) -> Row | None:
        """What was measured of a claim, at tuned rates."""
        if claim.against == BASELINE:
            table = self.tuned
        elif {claim.arm, claim.against} <= set(self.arms):
            pair = Plan({}, self.plan.tasks, {claim.against: {}, claim.arm: {}}, self.plan.rates, self.plan.seeds)
            own = [entry for entry in self.cells if entry.cell.arm in pair.arms]
            table = tuned_table(own, pair, MARGIN)
        else:
            return None
        return row_of(table, claim.arm)


def _scored(line: dict[str, str]) -> ScoredCell:
    values: dict[str, Any] = {
        name: value if name in _WORDS else math.nan if value == "" else float(value) for name, value in line.items()
    }
    result = {**values, "gates": {}, "test_sums": [], "test_tokens": []}
    memory = result["peak_memory"]
    result["peak_memory"] = None if math.isnan(memory) else memory
    cell = Cell(values["task"], values["arm"], values["rate"], int(values["seed"]))
    return ScoredCell(cell, values["validation"], result)


def row_of(table: Table, arm: str) -> Row | None:
    return next((row for row in table.rows if row.arm == arm), None)


def judged(claim: Claim, row: Row | None) -> Verdict:
    """Whether what was measured supports a claim, speaks against it, or leaves it open."""
    found = None if row is None else row.by_task.get(claim.task) if claim.task else row.estimate
    if found is None or math.isnan(found.low):
        return "open"
    if found.high < claim.low or found.low > claim.high:
        return "not"
    if claim.within:
        # Moved so that the range lies around 0; one that is open to a side is closed far out.
        low, high = max(claim.low, -100.0), min(claim.high, 100.0)
        middle = (low + high) / 2
        shifted = found.__class__(**{**found.__dict__, "mean": found.mean - middle})
        return "supported" if shifted.is_within((high - low) / 2) else "open"
    return "supported" if (found.low > 0 if claim.low >= 0 else found.high < 0) else "open"


def _together(verdicts: Sequence[Verdict]) -> Verdict:
    if "not" in verdicts:
        return "not"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "open"


def _predicted(claim: Claim) -> str:
    if claim.within and claim.high < math.inf:
        return f"±{claim.high:g}"
    if claim.within:
        return f"above {claim.low:+g}"
    if math.isinf(claim.low):
        return "below 0"
    return "above 0" if math.isinf(claim.high) else f"{claim.low:+g} … {claim.high:+g}"


def _measured(claim: Claim, row: Row | None) -> str:
    found = None if row is None else row.by_task.get(claim.task) if claim.task else row.estimate
    where = f" on {claim.task}" if claim.task else ""
    where += f" to `{claim.against}`" if claim.against != BASELINE else ""
    value = "not run" if found is None else f"{signed(found.mean)} {interval(found.low, found.high)}".strip()
    return f"`{claim.arm}`{where} {value}"


def answers(export: Export) -> list[list[str]]:
    """Each hypothesis that has an arm here: its prediction, what was measured (95 %), a verdict, and those by task."""
    rows = []
    for name, (says, claims) in HYPOTHESES.items():
        found = [(claim, export.row(claim)) for claim in claims]
        if not any(row for _, row in found):
            continue
        ranges = list(dict.fromkeys(_predicted(claim) for claim in claims))
        verdict = _together([judged(claim, row) for claim, row in found])
        measured = "; ".join(_measured(*each) for each in found)
        rows.append([f"{name}. {says}", "; ".join(ranges), measured, verdict, _by_task(export, found)])
    rows += [_untuned(export)] if set(_SHORTENING) & set(export.arms) else []
    return [*rows, _forgotten(export)]


def _by_task(export: Export, found: Sequence[tuple[Claim, Row | None]]) -> str:
    """The verdicts on the tasks one by one, of a hypothesis that names none."""
    tasks: dict[Verdict, list[str]] = {}
    for task in export.plan.tasks:
        own = [judged(claim._replace(task=task), row) for claim, row in found if claim.task is None]
        tasks.setdefault(_together(own), []).append(task)
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in sorted(tasks.items(), reverse=True))


def _untuned(export: Export) -> list[str]:
    highest = export.common[-1]
    verdicts: list[Verdict] = []
    parts = []
    for arm in _SHORTENING:
        at_common, at_tuned = row_of(highest, arm), row_of(export.tuned, arm)
        claim = Claim(arm, -math.inf, 0.0)
        parts.append(
            f"{_measured(claim, at_common)}, tuned {signed(at_tuned.estimate.mean) if at_tuned else 'not run'}"
        )
        verdict = judged(claim, at_common)
        if at_common and at_tuned and at_common.estimate.mean >= at_tuned.estimate.mean:
            verdict = "not"
        verdicts.append(verdict)
    return [
        "R12. An untuned comparison misleads",
        f"below 0 at {highest.rate:g}",
        "; ".join(parts),
        _together(verdicts),
        "",
    ]


def _forgotten(export: Export) -> list[str]:
    less = [row for row in export.tuned.rows if row.forgetting_change < -10]
    against = [row for row in less if row.estimate.high < 0]
    told = all(row.estimate.low > 0 for row in less)
    verdict: Verdict = "not" if against else "supported" if export.tuned.rows and told else "open"
    parts = [f"`{row.arm}` KL {signed(row.forgetting_change)}, loss {signed(row.estimate.mean)}" for row in less]
    prediction = "KL 10 % lower only where the loss is higher"
    return ["R13. Less is forgotten where less is moved", prediction, "; ".join(parts) or "no KL that low", verdict, ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def scope(export: Export) -> str:
    """One line that says what was run and what is missing."""
    hours = sum(entry.result["seconds"] for entry in export.cells) / 3600
    devices = ", ".join(sorted({entry.result["device"] for entry in export.cells})) or "nothing"
    left = missing(export.cells, export.plan)
    return (
        f"`{export.name}`: {len(export.cells)} cells, {hours:.1f} hours of training on {devices}; "
        f"{len(export.plan.tasks)} tasks ({', '.join(export.plan.tasks)}), {len(export.arms)} arms, rates "
        f"{', '.join(f'{rate:g}' for rate in export.plan.rates)}, {export.plan.seeds} seeds; {left or 'no'} cells of "
        f"that grid are missing or left out."
    )


def draw_figures(output: Path, folder: Path = RESULTS) -> None:
    """Draws the figures of each comparison."""
    for export in exports(folder):
        draw(export, output)


def exports(folder: Path = RESULTS) -> list[Export]:
    """The comparisons that are in the tree."""
    found = [Export(file) for file in sorted(folder.glob("*.csv"))]
    return [export for export in found if export.cells]


def page_parts(folder: Path = RESULTS) -> dict[str, Any]:
    """What the pages take: ``real_weights``, the answers, and ``real_weights_tables``, what they rest on.

    ``weights.COMPARISON.ARM.TASK`` is the change of test loss in % with its interval; ``pooled`` is all tasks. So is
    ``weights.COMPARISON.ARM["TASK at RATE"]`` at a common rate.
    """
    found = exports(folder)
    values = {export.name: _values(export) for export in found}
    if not found:
        return {
            "real_weights": "No cell on real weights is in the tree yet.",
            "real_weights_scope": "",
            "real_weights_tables": "None yet.",
            "weights": values,
        }
    head = ["Hypothesis", "Predicted, %", "Measured, % (95 %)", "Verdict", "Task by task"]
    screens = [
        f"### Hypotheses in {export.name}\n\n{scope(export)}\n\n{_table(head, answers(export))}\n\n"
        f"![Test loss by rate, against LoRA at its best rate](figures/{export.name}_rates.svg)\n\n"
        f"![KL to the base model over test loss](figures/{export.name}_forgetting.svg)"
        for export in found
    ]
    claimed = {claim.arm for _, own in HYPOTHESES.values() for claim in own}
    absent = sorted(claimed - {arm for export in found for arm in export.arms})
    if absent:
        screens.append(f"Not run: {', '.join(f'`{arm}`' for arm in absent)}.")
    tables = [f"### Arms in {export.name}\n\n{_arms(export)}\n\n{_tasks(export)}" for export in found]
    return {
        "real_weights": "\n\n".join(screens),
        "real_weights_scope": "\n".join(f"- {scope(export)}" for export in found),
        "real_weights_tables": "\n\n".join(tables),
        "weights": values,
    }


def _values(export: Export) -> dict[str, dict[str, str]]:
    found = {}
    for row in export.tuned.rows:
        own = {"pooled": row.estimate, **row.by_task}
        for table in export.common:
            at = row_of(table, row.arm)
            own |= {f"{task} at {table.rate:g}": each for task, each in (at.by_task if at else {}).items()}
        found[row.arm] = {name: f"{signed(each.mean)} {interval(each.low, each.high)}" for name, each in own.items()}
    return found


def _tasks(export: Export) -> str:
    tasks = list(export.plan.tasks)
    rows = []
    for arm, values in _values(export).items():
        row = row_of(export.tuned, arm)
        rates = row.rates if row else {}
        cells = (f"{values[task]} at {rates[task]:g}" if task in values else "" for task in tasks)
        rows.append([f"`{arm}`", *cells])
    at = export.tuned.baseline_rates
    losses = export.tuned.baseline_losses
    own = (f"{losses[task]:.4f} nats at {at[task]:g}" if task in at else "" for task in tasks)
    return _table(["Arm", *tasks], [[f"`{BASELINE}`", *own], *rows])


def _arms(export: Export) -> str:
    rows = []
    for row in export.tuned.rows:
        at = [row_of(table, row.arm) for table in export.common]
        equal = at_equal_loss(export, row.arm).values()
        ratio = math.exp(sum(map(math.log, equal)) / len(equal)) if equal else math.nan
        rates = [signed(each.estimate.mean) if each else "" for each in at]
        tuned = f"{signed(row.estimate.mean)} {interval(row.estimate.low, row.estimate.high)}"
        forgotten = [number(row.forgetting), number(ratio), str(len(equal)), number(row.own), number(row.seconds)]
        rows.append([f"`{row.arm}`", tuned, row.verdict, *rates, *forgotten])
    common = [f"all at {table.rate:g}" for table in export.common]
    last = ["KL", "KL ÷ LoRA's at equal loss", "tasks", "KL on its answers", "time"]
    return _table(["Arm", "tuned", "verdict", *common, *last], rows)


def main(files: Sequence[str]) -> None:
    """Takes exports in and writes the pages."""
    from benchmarks.study.cells import recorded
    from benchmarks.study.report.evidence import write_evidence

    RESULTS.mkdir(exist_ok=True)
    for file in files:
        if not Path(file).is_file():
            sys.exit(f"error: there is no file {file!r}; give the cells.csv of na-lora compare.")
        shutil.copyfile(file, RESULTS / Path(file).name)
    write_evidence(recorded().values())


if __name__ == "__main__":
    main(sys.argv[1:])
