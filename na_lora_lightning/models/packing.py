"""Whether a model keeps records apart that stand in one row."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from na_lora_lightning.core.discovery.undisturbed import undisturbed
from na_lora_lightning.core.model_entry import root_of, vocabulary_size
from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.limits import has_table
from na_lora_lightning.models.output_head import are_same

# The middle one is longer than what convolutions reach back over.
_LENGTHS = (5, 9, 6)
# Models with longer tables of positions are not tried on a whole one.
_LONGEST_TABLE = 2048


def require_packable(model: Any, positions: int | None) -> None:
    """Runs a model on three short records in one row, on each alone, and after another, and compares the logits.

    The row has no attention mask, and position ids that begin anew with each record, from which transformers makes
    attention within records.

    Args:
        model: A PEFT model, on the device where it trains.
        positions: Number of positions that its configuration names; None where it names none.

    Raises:
        ConfigurationError: The logits differ, or the model does not run in this way.
    """
    root = root_of(model)
    name = type(root).__name__
    try:
        reason = _reason(model, root, positions)
    except Exception as error:  # Models are of many kinds, and each fails in a way of its own.
        reason = f"it does not run on them ({one_line(error)})"
    if reason is not None:
        raise ConfigurationError(
            f"data.packing puts the records of a batch into one row, which {name} cannot take: {reason}; set "
            "data.packing to false."
        )


@torch.no_grad()
def _reason(model: Any, root: Any, positions: int | None) -> str | None:
    if "position_ids" not in inspect.signature(root.forward).parameters:
        return "its forward takes no position_ids, by which records are told apart"
    vocabulary = vocabulary_size(root)
    chunks = getattr(root.config.get_text_config(), "attention_chunk_size", None)
    if chunks is not None and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        return "this version of transformers counts the chunks of its attention from the beginning of the row"
    if vocabulary is None:
        return "it does not say how many tokens it knows"
    with undisturbed(root):
        try:
            device = next(root.parameters()).device
            ids = torch.arange(sum(_LENGTHS)).mul(7).remainder(vocabulary).to(device)
            packed = model(**packed_inputs(ids, _LENGTHS)).logits[0]
            for part, found in zip(ids.split(_LENGTHS), packed.split(_LENGTHS), strict=True):
                inputs = {"input_ids": part[None], "attention_mask": torch.ones_like(part)[None], "use_cache": False}
                if not are_same(model(**inputs).logits[0], found):
                    return "in a row a record's logits are others than alone"
            # What crosses a border a little, as short convolutions do, drowns in rounding there, but not here.
            others = torch.cat([ids[: _LENGTHS[0]].add(1).remainder(vocabulary), ids[_LENGTHS[0] :]])
            again = model(**packed_inputs(others, _LENGTHS)).logits[0]
            rounding = 8 * torch.finfo(packed.dtype).eps * packed.float().abs().max()
            if (packed - again)[_LENGTHS[0] :].float().abs().max() > rounding:
                return "in a row a record's logits depend on the record before it"
            if positions is not None and positions <= _LONGEST_TABLE and has_table(root, max(positions - 16, 1)):
                # A row is longer than its records, which tables of causal masks may not be.
                lengths = (positions // 2, positions // 2, 16)
                model(**packed_inputs(torch.zeros(sum(lengths), dtype=torch.int64, device=device), lengths))
        finally:
            # A sharded model is left gathered by a pass without a backward pass.
            Shards(model).reshard()
    return None


def packed_inputs(ids: Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The call of a model on records in one row.

    Args:
        ids: ``[tokens]``, one record after the other.
        lengths: Of the records.
    """
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    return {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
