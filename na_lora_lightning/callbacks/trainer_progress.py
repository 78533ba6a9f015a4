"""The only place that reads Lightning's private state: at which steps a trainer logs, and under which number.

Lightning's own callbacks (``LearningRateMonitor``, ``DeviceStatsMonitor``) read the same, and there is no public way to
it: ``Trainer.global_step`` counts otherwise where several optimizers step in one batch.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from lightning.pytorch import Trainer

from na_lora_lightning.errors import ConfigurationError

_IS_LOGGING_STEP = "_logger_connector.should_update_logs"
_LOGGED_STEP = "fit_loop.epoch_loop._batches_that_stepped"


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the trainer logs the batch that is about to be trained on (``log_every_n_steps``), and to something."""
    return bool(trainer.loggers) and bool(_read(trainer, _IS_LOGGING_STEP))


def logged_step(trainer: Trainer) -> int:
    """The step under which the trainer logs that batch: batches that ended in an optimizer step before it."""
    return int(_read(trainer, _LOGGED_STEP))


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
