"""Base models: shipped with the project, a zip of each folder, and unpacked into a cache that cells load them from."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.study import StudyError
from benchmarks.study.base_models.language import token_stream, weights_digest, windows_of
from benchmarks.study.tasks import pools
from benchmarks.study.tasks.encoding import tokenizer_of

FOLDER = Path(".cache/study/models")
# Another machine's processor would pretrain others, bit for bit.
SHIPPED = Path(__file__).parents[1] / "models"
_HELD_OUT_WINDOWS, _HELD_OUT_LENGTH = 32, 128


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


@lru_cache(maxsize=2)
def base_model(folder: str, dtype: str) -> tuple[PreTrainedModel, Any, str]:
    """Base model on the CPU, its tokenizer (its processor where it takes images) and digest of the weights."""
    if Path(folder).parent == FOLDER:
        take_shipped(Path(folder))
    if not (Path(folder) / "config.json").is_file():
        raise StudyError(
            f"there is no model in {folder!r}; pretrain it with `python -m benchmarks.study pretrain`, or put it there "
            "(SmolLM2 and Gemma: examples/quickstart/prepare.py; SmolLM2 that sees: examples/vlm_digits/run.py)."
        )
    disable_progress_bar()
    takes_images = getattr(AutoConfig.from_pretrained(folder), "vision_config", None) is not None
    kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
    processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(folder)
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if takes_images:
        # Folders have the chat template in either place.
        tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return model, processor, weights_digest(model)


def fresh_model(folder: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A copy of a base model that a cell may change."""
    base, _, _ = base_model(folder, dtype)
    copied = copy.deepcopy(base)
    return copied if device.type == "cpu" else copied.to(device)  # type: ignore[arg-type]


def held_out_windows(folder: str, tokenizer: Any) -> Tensor:
    """Windows of held-out documentation, ``[32, 128]``, on which forgetting is measured."""
    kept = Path(folder) / "held_out.pt"
    if kept.is_file():
        return torch.load(kept, weights_only=True)[:_HELD_OUT_WINDOWS]
    documents = [example.answer for example in pools.pool({"kind": "documentation"})]
    return windows_of(token_stream(tokenizer, documents), _HELD_OUT_WINDOWS, _HELD_OUT_LENGTH)
