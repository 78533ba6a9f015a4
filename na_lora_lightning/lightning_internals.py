"""The only place that reads Lightning's private state: how far a trainer is, what it logs, and what loggers write to.

Lightning's own callbacks (``LearningRateMonitor``, ``DeviceStatsMonitor``) read the same, and there is no public way to
it: ``Trainer.global_step`` counts otherwise where several optimizers step in one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from operator import attrgetter
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch.optim.swa_utils import AveragedModel

from na_lora_lightning.errors import ConfigurationError

_IS_LOGGING_STEP = "_logger_connector.should_update_logs"
_LOGGED_STEP = "fit_loop.epoch_loop._batches_that_stepped"
# Functions that make a module and then load a checkpoint into it: what they call the two.
_LOADERS = {
    "trainer.trainer._run": ("model", "ckpt_path"),
    "core.saving._load_state": ("obj", "checkpoint"),
}
# Attributes by which modules and data know what runs them.
BACK_REFERENCES = ("_trainer", "_fabric")
_PACKAGES = ("lightning", "pytorch_lightning")
# Methods that the command line overrides, or calls.
_OF_CLI = (
    *("_get", "_instantiate_trainer", "_parse_ckpt_path", "_prepare_subcommand_kwargs", "_run_subcommand"),
    "_set_seed",
)
# Those of the CSV logger's writer, which would delete what is there.
_OF_WRITER = ("_check_log_dir_exists", "_rewrite_with_new_header")


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


def metrics_of_loop(trainer: Trainer) -> dict[str, float]:
    """What the loop under way, training or validation, has logged of its batch or epoch so far, by name."""
    metrics = convert_tensors_to_scalars(dict(_read(trainer, "_logger_connector").metrics["callback"]))
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def processed_batches(trainer: Trainer) -> int:
    """Training batches of all epochs so far, those before a resume included."""
    return int(_read(trainer, "fit_loop.epoch_loop.batch_progress").total.processed)


def progress_of_fit(checkpoint: dict[str, Any]) -> tuple[dict[str, int], int]:
    """How far a checkpoint's fit was: the counts of its epochs, and the batches of the last epoch."""
    fit_loop = checkpoint["loops"]["fit_loop"]
    return fit_loop["epoch_progress"]["current"], fit_loop["epoch_loop.batch_progress"]["current"]["ready"]


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


def cluster_environment(trainer: Trainer) -> Any:
    """Who started the processes of a trainer, which not every strategy says."""
    return _read(trainer, "_accelerator_connector.cluster_environment")


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of a module; None where it has none, which ``module.trainer`` raises for."""
    trainer: Trainer | None = _read(module, "_trainer")
    return trainer


def loads_checkpoint(module: LightningModule) -> bool:
    """Whether a trainer, or ``load_from_checkpoint``, will give a checkpoint's weights to the module that it makes.

    Both keep to themselves what they load until the module has its model. Where it cannot be told, as in another
    version of Lightning, the answer is no.
    """
    frame = inspect.currentframe()
    while frame is not None:
        home = str(frame.f_globals.get("__name__")).split(".")[-2:]
        names = _LOADERS.get(".".join([*home, frame.f_code.co_name]))
        if names is not None and frame.f_locals.get(names[0]) is module:
            return bool(frame.f_locals.get(names[1]))
        frame = frame.f_back
    return False


def averages_between_processes(strategy: Any) -> bool:
    """Whether a strategy averages weights over processes from time to time (post-local SGD)."""
    # Strategies of one process have no such thing.
    return getattr(strategy, "_model_averager", None) is not None


def saves_distributed_checkpoint(strategy: Any) -> bool:
    """Whether a strategy for sharded models writes a folder with a file for each process."""
    return bool(_read(strategy, "_save_distributed_checkpoint"))


def version_of(logger: Logger) -> Any:
    """The version that a logger was given, without making one; None where it was given none or has no such thing."""
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return _read(logger, "_version")
    if isinstance(logger, MLFlowLogger):
        return _read(logger, "_run_id")
    return logger.version if isinstance(logger, WandbLogger) else None


def set_version(logger: Logger, version: Any) -> bool:
    """Has a logger that has not begun go on with a version; returns whether it can."""
    # It has to have what is set.
    version_of(logger)
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        logger._version = version
    elif isinstance(logger, MLFlowLogger):
        logger._run_id = version
    elif isinstance(logger, WandbLogger):
        logger._id = _read(logger, "_wandb_init")["id"] = version
    else:
        return False
    return True


def mlflow_experiment(logger: MLFlowLogger) -> str | None:
    """The number of a logger's experiment; None where there is none yet, and none is made."""
    experiment = _read(logger, "_mlflow_client").get_experiment_by_name(_read(logger, "_experiment_name"))
    return None if experiment is None else str(experiment.experiment_id)


def give_csv_writer(logger: CSVLogger, make: Callable[[], ExperimentWriter]) -> None:
    """Has a logger that has not begun write with another writer."""
    if _read(logger, "_experiment") is None:
        logger._experiment = make()


def require_csv_writer() -> None:
    """Checks that Lightning's CSV writer has the methods that are overridden to keep what is there.

    Raises:
        ConfigurationError: This version of Lightning has others.
    """
    for name in _OF_WRITER:
        _read(ExperimentWriter, name)


def require_cli(kind: type) -> None:
    """Checks that ``LightningCLI`` has the methods that are overridden.

    Args:
        kind: That class.

    Raises:
        ConfigurationError: This version of Lightning has others.
    """
    for name in _OF_CLI:
        _read(kind, name)


def parsers_of_commands(cli: Any) -> dict[str, Any]:
    """The parser of each subcommand of a ``LightningCLI``."""
    parsers: dict[str, Any] = _read(cli, "_subcommand_parsers")
    return parsers


def averaged_model(callback: Callback) -> AveragedModel:
    """The averages that a callback keeps during a fit.

    Raises:
        ConfigurationError: This version of Lightning keeps them elsewhere.
    """
    average = getattr(callback, "_average_model", None)
    if not isinstance(average, AveragedModel):
        raise ConfigurationError(
            f"{_version_of_package(callback)} keeps no averages in {type(callback).__name__}, so that they cannot be "
            "kept to the adapter; install the version that is named in constraints.txt."
        )
    return average


def require_progress(trainer: Trainer) -> None:
    """Checks that the trainer can be asked, before training.

    Raises:
        ConfigurationError: This version of Lightning keeps it elsewhere.
    """
    is_logging_step(trainer)
    logged_step(trainer)


def _read(owner: Any, path: str) -> Any:
    try:
        return attrgetter(path)(owner)
    except AttributeError as error:
        raise ConfigurationError(
            f"{_version_of_package(owner)} has no {_kind(owner).__name__}.{path} ({error}), by which NA-LoRA keeps "
            "step with it; install the version that is named in constraints.txt."
        ) from error


def _kind(owner: Any) -> type:
    """Lightning's own class of an object, or of a class, that may be of another derived from it."""
    kinds: tuple[type, ...] = (owner if isinstance(owner, type) else type(owner)).__mro__
    return next((kind for kind in kinds if kind.__module__.partition(".")[0] in _PACKAGES), kinds[0])


def _version_of_package(owner: Any) -> str:
    package = _kind(owner).__module__.partition(".")[0]
    package = package if package in _PACKAGES else _PACKAGES[0]
    return f"{package.replace('_', '-')} {version(package)}"
