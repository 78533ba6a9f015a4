"""Loggers by what they take, and the folder of a run; by class names, as two packages of Lightning have them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

_FOLDER_IS_LOG_DIR = ("TensorBoardLogger", "CSVLogger")


def is_tensorboard(logger: object) -> bool:
    """Whether a logger is TensorBoard's."""
    return _is(logger, "TensorBoardLogger")


def folder_of_run(trainer: Trainer) -> Path | None:
    """Where a run leaves files, by its first logger or by a callback that knows (``run_folder``).

    Returns:
        The folder; None in a process that does not write, for a dry run, where it is remote, and where neither a
        logger nor a callback gives the run a folder of its own.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    known = next((folder for each in trainer.callbacks if (folder := getattr(each, "run_folder", None))), None)  # type: ignore[attr-defined]
    if logger is not None and _is(logger, *_FOLDER_IS_LOG_DIR):
        folder = logger.log_dir
    elif isinstance(known, Path):
        folder = known
    elif logger is not None and isinstance(logger.save_dir, str) and logger.name and logger.version is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        # Where Lightning puts the checkpoints.
        folder = Path(logger.save_dir) / str(logger.name) / version
    else:
        return None
    return None if "://" in str(folder) else Path(folder)


def show_picture(logger: Any, tag: str, png: bytes, as_pixels: Callable[[bytes], Any], step: int) -> None:
    """Gives a picture to a logger of TensorBoard, W&B or MLflow; others take none.

    Args:
        logger: Of the process that writes.
        tag: Name of the picture.
        png: The file.
        as_pixels: Makes ``[height, width, 3]`` of it.
        step: Under which loggers show it.
    """
    if is_tensorboard(logger):
        logger.experiment.add_image(tag, as_pixels(png), step, dataformats="HWC")
    elif _is(logger, "WandbLogger"):
        logger.log_image(tag, [_opened(png)], step=step)
    elif _is(logger, "MLFlowLogger"):
        logger.experiment.log_image(logger.run_id, _opened(png), f"{tag}/step_{step:06d}.png")


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _is(logger: object, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(logger).__mro__)
