"""The only place that reads Lightning's private state: how far a trainer is, and what it logs under which number.

Lightning's own callbacks (``LearningRateMonitor``, ``DeviceStatsMonitor``) read the same, and there is no public way to
it: ``Trainer.global_step`` counts otherwise where several optimizers step in one batch.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, Trainer
from torch.optim.swa_utils import AveragedModel

from na_lora_lightning.errors import ConfigurationError

_IS_LOGGING_STEP = "_logger_connector.should_update_logs"
_LOGGED_STEP = "fit_loop.epoch_loop._batches_that_stepped"


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the trainer logs the batch that is about to be trained on (``log_every_n_steps``), and to something."""
    return bool(trainer.loggers) and is_step_to_log(trainer)


def is_step_to_log(trainer: Trainer) -> bool:
    """The same, whether there is a logger or not."""
    return bool(_read(trainer, _IS_LOGGING_STEP))


def logged_step(trainer: Trainer) -> int:
    """The step under which the trainer logs that batch: batches that ended in an optimizer step before it."""
    return int(_read(trainer, _LOGGED_STEP))


def planned_steps(trainer: Trainer) -> float | None:
    """Optimizer steps that are still to come in the fit under way; None where they cannot be told.

    That is where training is manual or several optimizers step, accumulation changes, or data have no length. A dry
    run (``fast_dev_run``) has no plan.
    """
    follows_plan = trainer.lightning_module.automatic_optimization and len(trainer.optimizers) == 1
    changes = any(hasattr(each, "going_to_accumulate_grad_batches") for each in trainer.callbacks)  # type: ignore[attr-defined]
    if not follows_plan or changes or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    total = trainer.estimated_stepping_batches
    return None if total < 0 else total - trainer.global_step


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the optimizer does not step after this batch."""
    return bool(_read(trainer, "fit_loop._should_accumulate")())


def is_last_batch(trainer: Trainer) -> bool:
    """Whether this batch is the last of its epoch."""
    return bool(_read(trainer, "fit_loop.epoch_loop.batch_progress").is_last_batch)


def validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer is going to validate after this batch."""
    return bool(_read(trainer, "fit_loop.epoch_loop._should_check_val_fx")(_read(trainer, "fit_loop._data_fetcher")))


def unlogged_metrics(trainer: Trainer) -> tuple[int, int, dict[str, float]]:
    """What a trainer is still going to log when a callback ends a batch, a validation or an epoch.

    Returns:
        The step that belongs to the last batch, the step that the metrics belong to, and the metrics by name.
    """
    batches: Any = _read(trainer, "fit_loop.epoch_loop.batch_progress").total
    epochs: Any = _read(trainer, "fit_loop.epoch_progress").total
    at_batch_end = batches.completed < batches.processed
    at_epoch_end = not at_batch_end and epochs.completed < epochs.processed
    # Counted up after the batch, and after validation.
    last_step = logged_step(trainer) - (1 if at_epoch_end else 0)
    if trainer.validating or not (at_epoch_end or (at_batch_end and is_logging_step(trainer))):
        return last_step, last_step, {}
    metrics = convert_tensors_to_scalars(dict(_read(trainer, "_logger_connector").metrics["log"]))
    named = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    step = int(named.pop("step", last_step))
    return last_step, step, {"epoch": trainer.current_epoch, **named} if named else {}


def forget_batches_of_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Has a fit that goes on after an epoch count the batches of the next one from its first.

    With ``max_steps`` and without validation, Lightning counts on from those of the finished epoch, and so steps after
    other micro-batches than a fit that was not interrupted.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current = progress["current"]
    if progress["is_last_batch"] and current["completed"] == current["ready"]:
        progress["current"] = dict.fromkeys(current, 0)


def set_received_sigterm(trainer: Trainer, received: bool) -> None:
    """Has the trainer stop, or not, after this batch, as it does once it was sent SIGTERM."""
    _read(trainer, "_signal_connector").received_sigterm = received


def averaged_model(callback: Callback) -> AveragedModel:
    """The averages that a callback keeps during a fit.

    Raises:
        ConfigurationError: This version of Lightning keeps them elsewhere.
    """
    average = getattr(callback, "_average_model", None)
    if not isinstance(average, AveragedModel):
        raise ConfigurationError(
            f"this version of lightning keeps no averages in {type(callback).__name__}, so that they cannot be kept to "
            "the adapter; install the version that is named in constraints.txt."
        )
    return average


def require_progress(trainer: Trainer) -> None:
    """Checks that the trainer can be asked, before training.

    Raises:
        ConfigurationError: This version of Lightning keeps it elsewhere.
    """
    is_logging_step(trainer)
    logged_step(trainer)


def _read(trainer: Trainer, path: str) -> Any:
    try:
        return attrgetter(path)(trainer)
    except AttributeError as error:
        package = type(trainer).__module__.partition(".")[0]
        raise ConfigurationError(
            f"this version of {package} has no Trainer.{path} ({error}), by which the NA-LoRA callbacks log at the "
            "trainer's own steps; install the version that is named in constraints.txt."
        ) from error
