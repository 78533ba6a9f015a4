"""EVA: LoRA's A begins with the directions in which a layer's inputs vary most on training data.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", https://arxiv.org/abs/2410.07170.
PEFT does it; every layer keeps the rank that it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from na_lora_lightning.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from peft import PeftModel

_BATCHES = 32
_MOST_FORWARD_PASSES = 256


def begin_with_eva(model: PeftModel, batches: Iterable[Mapping[str, Any]]) -> int:
    """Gives A of every LoRA layer the first right singular vectors of the layer's inputs; B stays 0.

    Args:
        model: The PEFT model, whose configuration has ``init_lora_weights="eva"``; changed in place.
        batches: The model's inputs, of which the first 32 with at least as many tokens as the rank are looked at, again
            and again until the vectors stay. Padding does not count.

    Returns:
        The number of batches.

    Raises:
        ConfigurationError: An adapted layer is not linear, there is too little data, or the vectors go on changing.
    """
    from peft import initialize_lora_eva_weights

    config = model.peft_config["default"]
    rank: int = config.r  # type: ignore[attr-defined]
    other = [
        name
        for name, value in model.named_parameters()
        if "lora_embedding_" in name or (value.ndim > 2 and "lora_A" in name)
    ]
    if other:
        raise ConfigurationError(
            f"lora.init_lora_weights='eva' is for linear layers, and {other[0].partition('.lora_')[0]!r} is none; "
            "leave it out of lora.target_modules."
        )
    enough = list(islice((batch for batch in islice(batches, 8 * _BATCHES) if _tokens(batch) >= rank), _BATCHES))
    if not enough:
        raise ConfigurationError(
            f"lora.init_lora_weights='eva' needs batches of at least lora.r={rank} tokens, and the training data has "
            "none; raise data.batch_size, or lower lora.r."
        )
    passes = 0

    def forward(network: Any, inputs: Mapping[str, Any]) -> None:
        nonlocal passes
        passes += 1
        if passes > _MOST_FORWARD_PASSES:
            raise ConfigurationError(
                f"lora.init_lora_weights='eva' found no {rank} directions that stay in {_MOST_FORWARD_PASSES} forward "
                "passes, as inputs that vary too little have fewer; lower lora.r, or use 'orthogonal'."
            )
        network(**inputs, use_cache=False)

    # PEFT writes what it found, which is what there was: all ranks stay.
    kept = {name: getattr(config, name) for name in ("target_modules", "rank_pattern", "alpha_pattern")}
    was_training = model.training
    try:
        initialize_lora_eva_weights(model, enough, forward_fn=forward, show_progress_bar=False)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ConfigurationError(
            f"lora.init_lora_weights='eva' cannot begin with this data ({one_line(error)}); use another one."
        ) from error
    for name, value in kept.items():
        setattr(config, name, value)
    model.train(was_training)
    return len(enough)


def _tokens(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else torch.count_nonzero(mask))
