"""Options of callbacks in a checkpoint that training resumes from."""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar

from na_lora_lightning.callbacks.gate_callback import GateCallback

_PLAIN = (bool, int, float, str, type(None))
# Where a callback writes, how much it says, and whether the run goes on at all.
_LEFT_OUT = ("dirpath", "filename", "verbose", "starts_over")


def describe_callbacks(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The plain options of each callback that training depends on, by a name that is the same in another run.

    The two NA-LoRA callbacks keep theirs in their own state, which foreign projects have too.
    """
    return {
        name: {} if isinstance(callback, GateCallback) else dict(_options(callback))
        for name, callback in _named(trainer).items()
    }


def adopt_callback_options(
    checkpoint: dict[str, Any], recorded: Mapping[str, Mapping[str, Any]], trainer: Trainer
) -> Iterator[str]:
    """Puts the options of now into the state of callbacks in a checkpoint.

    Args:
        checkpoint: Loaded, and not restored yet; changed in place.
        recorded: What :func:`describe_callbacks` said of its run; empty for a checkpoint of an earlier version.
        trainer: The trainer of now.

    Yields:
        What has changed.
    """
    for name, options in describe_callbacks(trainer).items():
        for option, now in options.items():
            then = recorded.get(name, {}).get(option, now)
            if then != now:
                yield f"{name}.{option} {then} → {now}"
    gates = {name for name, callback in _named(trainer).items() if isinstance(callback, GateCallback)}
    kinds = {kind.__name__ for kind in GateCallback.__subclasses__()}
    for name in sorted((kinds & set(checkpoint.get("callbacks") or {})) - gates):
        yield f"{name} on → off"


def adopt_callback_states(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Keeps a checkpoint's callbacks from overruling options of now; before Lightning restores them."""
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            _find_state(states, callback)
        state = states.get(callback.state_key)
        if not isinstance(state, dict) or isinstance(callback, GateCallback):
            continue
        if isinstance(callback, ModelCheckpoint):
            _keep_fewer(state, callback)
            continue
        for option, now in _options(callback):
            if option in state:
                state[option] = now


def _named(trainer: Trainer) -> dict[str, Callback]:
    found: dict[str, Callback] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (ProgressBar, ModelSummary)):
            continue
        kind = type(callback).__name__
        number = sum(name.partition("[")[0] == kind for name in found)
        found[f"{kind}[{number}]" if number else kind] = callback
    return found


def _options(callback: Callback) -> Iterator[tuple[str, Any]]:
    for name in inspect.signature(type(callback)).parameters:
        value = getattr(callback, name, getattr(callback, f"_{name}", callback))
        if name not in _LEFT_OUT and isinstance(value, _PLAIN):
            # EarlyStopping turns its sign with the mode.
            yield name, abs(value) if name == "min_delta" and isinstance(value, float) else value


def _find_state(states: dict[str, Any], callback: ModelCheckpoint) -> None:
    """Finds a state that is kept under a name with other options in it, such as how often to save."""
    if callback.state_key in states:
        return
    for key in states:
        kind, brace, options = str(key).partition("{")
        if kind != type(callback).__qualname__ or not brace:
            continue
        try:
            former = literal_eval(brace + options)
        except (ValueError, SyntaxError):
            continue
        if (former.get("monitor"), former.get("mode")) == (callback.monitor, callback.mode):
            states[callback.state_key] = states.pop(key)
            return


def _keep_fewer(state: dict[str, Any], callback: ModelCheckpoint) -> None:
    """Forgets all but the best ``save_top_k``; Lightning makes room for the next one alone."""
    kept: dict[str, Any] = dict(state.get("best_k_models") or {})
    surplus = len(kept) - callback.save_top_k
    if callback.save_top_k < 1 or surplus <= 0:
        return
    worst_first = sorted(kept, key=lambda path: float(kept[path]), reverse=callback.mode == "min")
    for path in worst_first[:surplus]:
        del kept[path]
    worst = worst_first[surplus]
    state.update(best_k_models=kept, kth_best_model_path=worst, kth_value=kept[worst])
    if "superseded" in state:
        state["superseded"] = [*state["superseded"], *worst_first[:surplus]]
