"""Runs random combinations of the options of ``na-lora fit``: each is right, or is refused in one sentence.

::

    cd tests && python -m fuzz.options --combinations 500

Right is: losses are finite; rows that a mask holds do not move; a run that only watches is plain LoRA bit by bit; the
adapter folder gives the trained model's logits in PEFT alone; and a run that resumes from one of its checkpoints comes
to the same weights. The second runs that some of this takes are made for every third combination.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz.option_checks import Spy, WrongError, require_equal, require_finite, require_plain_adapter, trained
from fuzz.option_space import Combination, draw
from module_helpers import saved_model, tiny_tokenizer, write_records
from tiny_models import tiny_mixtral

from na_lora_lightning.cli.main import main

_PLAIN = {"gate_importance.enabled": False, "step_scale.enabled": False}


@dataclass
class Outcome:
    """What became of a combination.

    Attributes:
        combination: Its options.
        kind: ``"right"``, ``"refused"`` or ``"wrong"``.
        text: The sentence of a refusal, or what was wrong.
        checks: Which second runs were made.
    """

    combination: Combination
    kind: str
    text: str = ""
    checks: tuple[str, ...] = ()


def prepare(folder: Path) -> tuple[dict[str, str], str]:
    """Saves the models and the data; returns the models' folders by kind and the data file."""
    kinds = {kind: saved_model(folder / kind, kind) for kind in ("llama", "gpt2")}
    tiny_mixtral().save_pretrained(folder / "mixtral")
    tiny_tokenizer().save_pretrained(folder / "mixtral")
    kinds["mixtral"] = str(folder / "mixtral")
    return kinds, write_records(folder / "records.jsonl")


def run(arguments: list[str]) -> tuple[int, str]:
    """Runs the command line in this process; its exit status, and what it said on standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main(arguments)
    return status, errors.getvalue()


def try_combination(combination: Combination, folder: Path) -> Outcome:
    """Runs a combination and checks it."""
    try:
        status, errors = run(combination.arguments(folder / "config.yaml"))
        if status == 2:
            return _refusal(combination, errors)
        if status != 0:
            return Outcome(combination, "wrong", f"exit status {status}")
        return Outcome(combination, "right", checks=tuple(_checks(combination, folder)))
    except WrongError as error:
        return Outcome(combination, "wrong", str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(combination, "wrong", " ".join(text.split())[:400])


def _refusal(combination: Combination, errors: str) -> Outcome:
    sentences = [line for line in errors.splitlines() if line.startswith("error: ")]
    if len(sentences) != 1 or "Traceback" in errors:
        return Outcome(combination, "wrong", f"refused by {len(sentences)} sentences: {errors[-300:]}")
    return Outcome(combination, "refused", sentences[0].removeprefix("error: "))


def _checks(combination: Combination, folder: Path) -> list[str]:
    spy = Spy.last
    if spy.module is None or spy.trainer is None:
        return ["no training"]
    require_finite(spy.losses)
    done = [] if not spy.held else ["held"]
    weights, trainer = trained(spy.module), spy.trainer
    if getattr(spy.module, "written_adapter_folder", None) is not None:
        require_plain_adapter(combination.options["model.model_name_or_path"], spy.module)
        done.append("adapter")
    if combination.only_watches:
        _again(combination, folder, "plain", **_PLAIN)
        require_equal(weights, trained(_module()), "a watched fit is not plain LoRA")
        done.append("plain")
    checkpoints = sorted(Path(str(trainer.default_root_dir)).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints and combination.number % 3 == 0:
        _again(combination, folder, "resumed", ckpt_path=str(checkpoints[0]))
        if Spy.last.module is not None:
            require_equal(trained(_module()), weights, f"a fit that resumes from {checkpoints[0].name}")
            done.append("resumed")
    return done


def _again(combination: Combination, folder: Path, name: str, **overrides: Any) -> None:
    Spy.last = Spy()
    own = folder / name
    own.mkdir()
    moved: dict[str, Any] = {"trainer.default_root_dir": str(own)}
    if "model.adapter.folder" in combination.options:
        moved["model.adapter.folder"] = str(own / "elsewhere")
    if isinstance(combination.options["trainer.logger"], dict):
        moved["trainer.logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(own)}}
    status, errors = run(combination.arguments(folder / f"{name}.yaml", **{**moved, **overrides}))
    if status:
        raise WrongError(f"{name}: exit status {status}: {errors[-300:]}")


def _module() -> Any:
    module = Spy.last.module
    if module is None:
        raise WrongError("the second run did not train")
    return module


def fuzz(combinations: int, seed: int, first: int = 0) -> list[Outcome]:
    """Runs ``combinations`` of a seed, from number ``first`` on, or as many as there is time for until Ctrl-C."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    outcomes: list[Outcome] = []
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as root:
        kinds, train = prepare(Path(root))
        for number in range(first, first + combinations):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                combination = draw(number, seed, kinds, train, Path(folder) / "run")
                outcomes.append(try_combination(combination, Path(folder)))
                if len(outcomes) % 50 == 0:
                    print(f"{len(outcomes)}: {dict(Counter(outcome.kind for outcome in outcomes))}", flush=True)
                if outcomes[-1].kind == "wrong":
                    print(f"wrong: {number}: {outcomes[-1].text}\n  {_shown(combination)}", flush=True)
    return outcomes


def _shown(combination: Combination) -> str:
    hidden = ("callbacks", "enable_progress_bar", "enable_model_summary", "accelerator", "devices", "default_root_dir")
    return str({name: value for name, value in combination.options.items() if not name.endswith(hidden)})


def report(outcomes: list[Outcome], seconds: float) -> None:
    """Prints the figures: what was right, and refusals by sentence with names and numbers left out."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    checks = Counter(check for outcome in outcomes for check in outcome.checks)
    refused = [outcome.text for outcome in outcomes if outcome.kind == "refused"]
    refusals = Counter(re.sub(r"'[^']*'|(?<!\w)-?\d[\d.]*", "_", text)[:110] for text in refused)
    print(f"{len(outcomes)} combinations in {seconds:.0f} s: {dict(kinds)}; of the right ones: {dict(checks)}")
    for sentence, count in refusals.most_common():
        print(f"{count:5} {sentence}")


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--combinations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first combination")
    options = parser.parse_args()
    start = time.perf_counter()
    outcomes = fuzz(options.combinations, options.seed, options.first)
    report(outcomes, time.perf_counter() - start)
    return int(any(outcome.kind == "wrong" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(_main())
