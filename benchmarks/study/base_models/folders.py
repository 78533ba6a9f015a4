"""Where base models are: shipped with the project, a zip of each folder, and in a cache that cells load them from."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.study.errors import StudyError

FOLDER = Path(".cache/study/models")
# Another machine's processor would pretrain others, bit for bit.
SHIPPED = Path(__file__).parents[1] / "models"


def read_record(folder: Path) -> dict[str, Any]:
    """``pretraining.json`` of a model.

    Raises:
        StudyError: There is none.
    """
    file = folder / "pretraining.json"
    if not file.is_file():
        raise StudyError(
            f"{str(folder)!r} holds no pretrained model of the study; make it with "
            f"`python -m benchmarks.study pretrain {folder.name}`."
        )
    return dict(json.loads(file.read_text()))


def take_shipped(folder: Path) -> bool:
    """Unpacks the model of a folder's name, if the project ships it, whole or not at all.

    Args:
        folder: Where the model should be; one that exists is left alone.

    Returns:
        Whether it was unpacked.
    """
    shipped = SHIPPED / f"{folder.name}.zip"
    if folder.exists() or not shipped.is_file():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        shutil.unpack_archive(shipped, partial := Path(scratch) / folder.name)
        # Another process may have been faster.
        with suppress(OSError):
            partial.rename(folder)
    return True
