"""Every base model of the study, and how it comes to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study import StudyError
from benchmarks.study.base_models import language, vision
from benchmarks.study.base_models.loading import FOLDER, SHIPPED, take_shipped


def pretrain_missing(names: Sequence[str], folder: Path = FOLDER, steps: int = 5000) -> None:
    """Unpacks the models that the project ships, and pretrains the others that are not there yet, on one thread.

    Raises:
        StudyError: There is no model of that name.
    """
    torch.set_num_threads(1)
    known = [*language.ARCHITECTURES, *vision.LANGUAGE_MODELS]
    for name in names or known:
        if name not in known:
            raise StudyError(f"there is no recipe for a model {name!r}; choose one of {', '.join(known)}.")
        if (folder / name / "pretraining.json").is_file():
            print(f"{name} is there already")
        elif take_shipped(folder / name):
            print(f"{name} is unpacked from {SHIPPED}")
        elif name in language.ARCHITECTURES:
            print(json.dumps(language.pretrain(name, folder, steps=steps)))
        else:
            pretrain_missing([vision.LANGUAGE_MODELS[name]], folder, steps)
            print(json.dumps(vision.pretrain(name, folder)))
