"""What a language model can take: the token ids that it has embeddings for, and the positions that it has."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from na_lora_lightning.errors import DataError
from na_lora_lightning.models.source import auto_class
from na_lora_lightning.models.weightless import fill_in

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# OPT's and BART's tables have two rows more than positions, RoBERTa's two fewer positions than rows.
_SLACK = 16
_POSITIONS = re.compile(r"(max|n)_.*position|max_seq|seq(uence)?_length|n_ctx|context_length")
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech).*token.*(id|index)")


class ModelLimits:
    """The limits of a model.

    Args:
        model: The base model, with or without LoRA; only its configuration and the size of its embedding are kept.

    Attributes:
        rows: Number of rows of the input embedding: token ids are below it.
        placeholders: Ids that stand for images and the like, which the model takes out before it looks up the others.
        positions: The number of positions that the configuration names, and its name there; None where it names none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.rows = _rows(model)
        self.placeholders = frozenset(
            value for name, value in _integers(config).items() if _PLACEHOLDER.search(name) and value >= self.rows
        )
        self.positions = _positions(config.get_text_config())
        self._config = config
        self._usable: dict[int, int] = {}

    def usable_length(self, length: int) -> int:
        """The most tokens up to ``length`` that the model can take at once.

        Where positions are looked up in a table, the table ends the text. Most newer models compute them, and take
        texts longer than their configuration says.
        """
        if self.positions is None or length <= self.positions[0] - _SLACK:
            return length
        # Near the end of the table, and not far beyond: what has no end there has none.
        wanted = min(length, self.positions[0] + _SLACK)
        if wanted not in self._usable:
            self._usable[wanted] = _usable_length(self._config, wanted, self.positions[0] - _SLACK)
        usable = self._usable[wanted]
        return length if usable == wanted else usable

    def describe_positions(self) -> str:
        """How messages call the number of positions."""
        assert self.positions is not None
        return f"the model's positions end there ({self.positions[1]}={self.positions[0]})"

    def require_batch(self, batch: Mapping[str, Any], max_new_tokens: int) -> None:
        """Checks a batch on the CPU.

        Args:
            batch: With ``input_ids``, ``[batch, length]``, and perhaps ``prompt_input_ids``, ``[batch, length]``.
            max_new_tokens: Number of tokens that are generated after prompts; 0 if none are.

        Raises:
            DataError: The model lacks a token or a position that it needs.
        """
        for name, added in (("input_ids", 0), ("prompt_input_ids", max(max_new_tokens - 1, 0))):
            ids = batch.get(name)
            if not isinstance(ids, Tensor) or ids.device.type != "cpu" or not ids.numel():
                continue
            if name == "prompt_input_ids" and not max_new_tokens:
                continue
            largest = int(ids.max())
            if largest >= self.rows:
                beyond = [value for value in ids[ids >= self.rows].tolist() if value not in self.placeholders]
                if beyond:
                    raise DataError(
                        f"a batch has the token id {beyond[0]}, and the model has embeddings for the ids 0 to "
                        f"{self.rows - 1}; use the model's own tokenizer, or resize its embedding and save it first."
                    )
            longest, positions = ids.shape[1], batch.get("position_ids")
            if name == "input_ids" and isinstance(positions, Tensor) and positions.shape == ids.shape:
                # Of packed records each has positions of its own.
                longest = int(positions.max()) + 1
            length = longest + added
            usable = self.usable_length(length)
            if usable < length:
                with_new = f" with {max_new_tokens} new ones" if added else ""
                raise DataError(
                    f"a batch is {longest} tokens long{with_new}, and no more than {usable} can be used, as "
                    f"{self.describe_positions()}; give shorter texts."
                )


def _rows(model: PreTrainedModel) -> int:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        weight = None
    # A model that takes no text, or several at once, has none to compare with.
    return sys.maxsize if weight is None else int(weight.shape[0])


def _integers(config: PreTrainedConfig) -> dict[str, int]:
    return {name: value for name, value in config.to_dict().items() if type(value) is int}


def _positions(config: PreTrainedConfig) -> tuple[int, str] | None:
    found = {name: value for name, value in _integers(config).items() if value > 1 and _POSITIONS.search(name)}
    return min(((value, name) for name, value in found.items()), default=None)


def _usable_length(config: PreTrainedConfig, wanted: int, surely: int) -> int:
    """Tries lengths on a model without weights; ``wanted`` if it takes that, or if it cannot be tried at all."""
    try:
        model = _probe(config)
    except Exception:  # Models are of many kinds; what cannot be made without weights cannot be tried.
        return wanted
    if not has_table(model, max(surely, 1)) or not _takes(model, 2) or _takes(model, wanted):
        return wanted
    low, high = max(surely, 2), wanted
    if not _takes(model, low):
        low = 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _takes(model, middle) else (low, middle)
    return low


def _probe(config: PreTrainedConfig) -> nn.Module:
    """A model of one block, where the configuration lets itself be cut so short."""

    def make(config: PreTrainedConfig) -> nn.Module:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        fill_in(model)
        return model.eval()

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    short = copy.deepcopy(config)
    try:
        text: Any = short.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        model = make(short)
        if _takes(model, 2):
            return model
    except Exception:  # Some models need several blocks, of several kinds.
        pass
    return make(config)


def has_table(model: nn.Module, rows: int) -> bool:
    """Whether a model has what positions could be looked up in, or biases by distance."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    if any(isinstance(m, nn.Embedding) and m is not tokens and m.num_embeddings >= rows for m in model.modules()):
        return True
    if any(max(buffer.shape, default=0) >= rows for buffer in model.buffers()):
        return True
    return "alibi" in str(model.config.to_dict()).lower()  # type: ignore[operator, union-attr]


@torch.no_grad()
def _takes(model: nn.Module, length: int) -> bool:
    ids = torch.zeros(1, length, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.random.fork_rng(devices=[]):
        try:
            model(**inputs)
        except Exception:  # Each kind of table ends in an error of its own.
            return False
    return True
