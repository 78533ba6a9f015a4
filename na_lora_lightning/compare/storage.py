"""A comparison in Optuna: its cells are trials, which workers take from Optuna's queue and give back scored.

A trial has the parameters ``rate`` and ``seed`` and the user attributes ``task``, ``arm`` and, once it is complete,
``result``; its value is the validation loss. What the comparison is stands in the user attributes of the study. Optuna
queues, locks and stores; a worker that is killed sends no more heartbeats, so that Optuna fails its trial, and the cell
is queued again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from na_lora_lightning.compare.grid import Result, ScoredCell, extensions, is_hopeless
from na_lora_lightning.compare.opening import without_news
from na_lora_lightning.compare.plan import Cell, Plan
from na_lora_lightning.errors import ConfigurationError, NALoRAError, one_line

_RATE = FloatDistribution(1e-12, 1e6, log=True)
_SEED = IntDistribution(0, 1_000_000)
# Of a cell that fails; one whose worker is killed is no failure.
_MOST_TRIES = 3
# Before the first is scored, for reasons that are none of its arm.
_MOST_FAILURES = 4


class Comparison:
    """A comparison that is kept in Optuna.

    Args:
        study: The study.
        plan: What is compared.
        storage: What it is kept in.

    Attributes:
        study: The study.
        plan: What is compared.
    """

    def __init__(self, study: optuna.Study, plan: Plan, storage: BaseStorage) -> None:
        self.study = study
        self.plan = plan
        self._notices_the_dead = not isinstance(storage, JournalStorage)
        # Cells that failed when this was started before are tried again, as what was wrong may be mended.
        self._first_trial = len(study.get_trials(deepcopy=False))
        self._failures: int | None = 0

    @classmethod
    def begin(cls, storage: BaseStorage, name: str, plan: Plan) -> Comparison:
        """Makes a comparison, or joins the one of that name.

        Rates and seeds may be added to one that is there; whatever else defines it has to be the same.

        Raises:
            ConfigurationError: It is another one.
        """
        identity = plan.identity()
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        except DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
        former = study.user_attrs.get("identity", {})
        changed = next((part for part in identity if former.get(part, identity[part]) != identity[part]), None)
        if changed is not None:
            raise ConfigurationError(
                f"the comparison {name!r} was begun with another value of {changed}, so its cells and new ones cannot "
                "be compared; restore it, or give another --output or --name."
            )
        if former:
            plan = _joined(Plan.restored(study.user_attrs["plan"]), plan)
        comparison, described = cls(study, plan, storage), plan.described()
        if study.user_attrs.get("plan") != described:
            study.set_user_attr("plan", described)
            study.set_user_attr("identity", {**former, **identity})
            # At once, so that workers that start together find the cells queued.
            comparison._queue(comparison._missing())
        return comparison

    @classmethod
    def is_known(cls, storage: BaseStorage, name: str, plan: Plan) -> bool:
        """Whether the comparison of that name has all that is in a plan."""
        try:
            former = optuna.load_study(storage=storage, study_name=name).user_attrs.get("identity", {})
        except KeyError:
            return False
        return plan.identity().keys() <= former.keys()

    @classmethod
    def there(cls, storage: BaseStorage, name: str) -> Comparison:
        """The comparison of that name.

        Raises:
            ConfigurationError: There is none.
        """
        try:
            study = optuna.load_study(storage=storage, study_name=name)
            return cls(study, Plan.restored(study.user_attrs["plan"]), storage)
        except KeyError as error:
            raise ConfigurationError(
                f"there is no comparison {name!r} in that storage; give --config and --arms to begin one."
            ) from error

    # ---- what there is ----

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of cells in some state, or in any, by number."""
        trials = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if "arm" in trial.user_attrs]

    def scored(self) -> list[ScoredCell]:
        """All cells that are complete, sorted, each once."""
        found: dict[Cell, ScoredCell] = {}
        for trial in self.trials(TrialState.COMPLETE):
            cell = cell_of(trial)
            found.setdefault(cell, ScoredCell(cell, float(trial.values[0]), trial.user_attrs["result"]))
        return [found[cell] for cell in sorted(found)]

    def count(self) -> dict[str, int]:
        """Number of cells by state: done, running, waiting, left out (rates that were pruned) and failed."""
        done = {entry.cell for entry in self.scored()}
        names = (("running", TrialState.RUNNING), ("waiting", TrialState.WAITING), ("failed", TrialState.FAIL))
        counts, seen = {"done": len(done)}, set(done)
        for name, state in names:
            cells = {cell_of(trial) for trial in self.trials(state)} - seen
            seen |= cells
            counts[name] = len(cells)
        pruned = {cell_of(trial) for trial in self.trials(TrialState.PRUNED)} - seen
        return {**counts, "left out": len(pruned)}

    def failures(self) -> dict[tuple[str, str], str]:
        """What went wrong with the arms, by task and arm, none of whose cells could be trained in three tries."""
        errors: dict[tuple[str, str], list[str]] = {}
        trained = set()
        for trial in self.trials():
            key = (trial.user_attrs["task"], trial.user_attrs["arm"])
            if trial.state == TrialState.COMPLETE:
                trained.add(key)
            elif self._has_failed(trial):
                errors.setdefault(key, []).append(trial.user_attrs["error"])
        return {key: each[-1] for key, each in errors.items() if len(each) >= _MOST_TRIES and key not in trained}

    def _has_failed(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.FAIL and trial.number >= self._first_trial and "error" in trial.user_attrs

    # ---- work ----

    def work(self, score: Callable[[Cell], Result], seconds: float | None = None, say: Any = print) -> bool:
        """Scores cells until none is left or the time is over.

        Args:
            score: Trains a cell; its result has ``validation``, the loss.
            seconds: After which no further cell is begun.
            say: Called with a line about each cell.

        Returns:
            Whether all cells are done.

        Raises:
            ConfigurationError: Every cell fails.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            if not self.trials(TrialState.WAITING):
                self._queue(self._missing())
            if self.trials(TrialState.WAITING):
                try:
                    with without_news():
                        self.study.optimize(
                            lambda trial: self._objective(trial, score, say), n_trials=1, catch=(Exception,)
                        )
                except (UpdateFinishedTrialError, ValueError):
                    # Two workers were given the same trial, as databases without locks of rows allow, and the other
                    # one was first.
                    continue
                if self._failures == _MOST_FAILURES:
                    last = self.trials(TrialState.FAIL)[-1].user_attrs.get("error", "")
                    raise ConfigurationError(
                        f"{_MOST_FAILURES} cells have failed and none was scored ({last.rstrip('.')}); correct that "
                        "and give the same command again."
                    )
            elif self.trials(TrialState.RUNNING):
                # Of other workers; their cells come back here if they die.
                if not self._notices_the_dead:
                    return False
                with without_news():
                    optuna.storages.fail_stale_trials(self.study)
                time.sleep(2.0)
            else:
                return True
        return not self._missing() and not self.trials(TrialState.WAITING, TrialState.RUNNING)

    def retake(self) -> int:
        """Queues cells again that are marked as running, for a storage without heartbeats whose worker was killed."""
        stale = self.trials(TrialState.RUNNING)
        for trial in stale:
            self.study.tell(trial.number, state=TrialState.FAIL)
        return len(stale)

    def _objective(self, trial: Trial, score: Callable[[Cell], Result], say: Any) -> float:
        if "arm" not in trial.user_attrs:
            # Optuna draws one where another worker took the last of the queue a moment before.
            raise optuna.TrialPruned("nothing was queued")
        cell = Cell(
            trial.user_attrs["task"],
            trial.user_attrs["arm"],
            trial.suggest_float("rate", _RATE.low, _RATE.high, log=True),
            trial.suggest_int("seed", _SEED.low, _SEED.high),
        )
        others = [other for other in self.trials() if cell_of(other) == cell and other.number != trial.number]
        is_done = any(other.state == TrialState.COMPLETE for other in others)
        alive = (TrialState.WAITING, TrialState.RUNNING)
        if is_done or any(other.number < trial.number and other.state in alive for other in others):
            # Two workers that started at once queued it.
            raise optuna.TrialPruned("another worker has it")
        if (cell.task, cell.arm) in self.failures():
            raise optuna.TrialPruned("its arm fails")
        if is_hopeless(cell, self.scored(), self.plan):
            raise optuna.TrialPruned("its rate is far from the best one")
        name = f"{cell.task} {cell.arm} rate {cell.rate:g} seed {cell.seed}"
        try:
            result = score(cell)
        except Exception as error:
            trial.set_user_attr("error", one_line(error))
            say(f"{name}: failed ({one_line(error)})")
            if self._failures is not None and not isinstance(error, NALoRAError):
                self._failures += 1
            raise
        self._failures = None
        trial.set_user_attr("result", result)
        say(f"{name}: validation {result['validation']:.4f}, test {result['test']:.4f}, {result['seconds']:.1f} s")
        return float(result["validation"])

    # ---- the grid ----

    def _queue(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            self.study.enqueue_trial(
                {"rate": cell.rate, "seed": cell.seed}, user_attrs={"task": cell.task, "arm": cell.arm}
            )

    def _missing(self) -> list[Cell]:
        """Cells that are to be trained and not queued yet."""
        alive, errors = set[Cell](), Counter[Cell]()
        under_way = set[tuple[str, str]]()
        for trial in self.trials():
            cell = cell_of(trial)
            if trial.state in (TrialState.WAITING, TrialState.RUNNING):
                under_way.add((cell.task, cell.arm))
            if trial.state in (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE):
                alive.add(cell)
            elif self._has_failed(trial):
                errors[cell] += 1
        scored = self.scored()
        wanted = self.plan.cells()
        for task in self.plan.tasks:
            for arm in self.plan.arms:
                own = [entry for entry in scored if (entry.cell.task, entry.cell.arm) == (task, arm)]
                rates = extensions(own, self.plan, is_over=(task, arm) not in under_way)
                wanted += [Cell(task, arm, rate, seed) for rate in rates for seed in range(self.plan.seeds)]
        failing = self.failures()
        wanted = [cell for cell in wanted if (cell.task, cell.arm) not in failing]
        missing = (cell for cell in wanted if cell not in alive and errors[cell] < _MOST_TRIES)
        return [cell for cell in missing if not is_hopeless(cell, scored, self.plan)]


def cell_of(trial: FrozenTrial) -> Cell:
    """The cell of a trial, whether it was begun or not."""
    queued = trial.system_attrs.get("fixed_params", {})
    rate, seed = (trial.params.get(name, queued.get(name)) for name in ("rate", "seed"))
    return Cell(trial.user_attrs["task"], trial.user_attrs["arm"], float(rate), int(seed))


def _joined(former: Plan, plan: Plan) -> Plan:
    """The plan of a comparison to which another worker brings more arms, tasks, rates or seeds."""
    values = plan.described()
    values["arms"] = {**former.arms, **plan.arms}
    values["tasks"] = {**former.tasks, **plan.tasks}
    values["rates"] = sorted({*former.rates, *plan.rates})
    values["seeds"] = max(former.seeds, plan.seeds)
    values["base"] = former.base
    return Plan.restored(values)
