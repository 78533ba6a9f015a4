"""Wraps a base model with LoRA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from na_lora_lightning.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.models.lora_inputs import keep_inputs_uncast
from na_lora_lightning.models.new_tokens import require_rows_free, require_rows_trained, token_ids, trained_rows
from na_lora_lightning.models.source import DUAL_ENCODERS, BaseModelSource
from na_lora_lightning.models.target_names import require_names_in_use, require_names_of_model
from na_lora_lightning.models.targets import ALL_EXPERTS, LoRATargets, lora_targets
from na_lora_lightning.models.ties import require_untiable


def add_lora(model: PreTrainedModel, lora: LoRAOptions, source: BaseModelSource) -> PeftModel:
    """Wraps a model with LoRA.

    After :func:`lightning.pytorch.seed_everything` the initial LoRA weights are a function of its seed alone, so that
    runs that differ in data, callbacks or options start from the same adapter; the random state is left as it was.

    Args:
        model: The base model; its parameters are frozen.
        lora: Which layers, and what kind of LoRA.
        source: Where ``model`` came from, to be named in the adapter, and which tokens are new in it.

    Returns:
        The PEFT model in training mode, its LoRA parameters in float32, of whose inputs no float32 copy is kept. What
        needs more than the model to begin (``"eva"``, ``"loftq"``) begins with no change.

    Raises:
        ConfigurationError: The options do not fit the model.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model

    from na_lora_lightning.models.fast_lora import use_fast_lora_layers

    require_names_of_model(model, lora)
    targets, new = _targets(model, lora, source), token_ids(source)
    config = LoraConfig(
        task_type=None if model.config.model_type in DUAL_ENCODERS else "CAUSAL_LM",
        base_model_name_or_path=source.resolved_name_or_path,
        revision=source.revision,
        r=lora.r,
        # PEFT only divides it, so a fraction is as good, but its files have a whole number where it is one.
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets.target_modules or None,
        exclude_modules=targets.exclude_modules,
        layers_to_transform=lora.layers_to_transform,
        target_parameters=targets.target_parameters,
        modules_to_save=lora.modules_to_save,
        trainable_token_indices=trained_rows(model, lora, new),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # PEFT's LoftQ quantises by itself, on a GPU alone.
        init_lora_weights=True if lora.init_lora_weights == "loftq" else lora.init_lora_weights,  # type: ignore[arg-type]
        # All ranks stay as they are given.
        eva_config=EvaConfig(rho=1.0, use_label_mask=False) if lora.init_lora_weights == "eva" else None,
    )
    require_rows_free(model, config)
    try:
        with _seeded_by_seed_everything(), warnings.catch_warnings():
            # PEFT corrects the setting by itself, layer by layer, and says so for each.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT asks transformers by the old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # Refused here, where names can be suggested.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            # Its directions come later, when there is data.
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
            # Merging gives adapted layers weights of their own.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            peft_model: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ConfigurationError(f"LoRA cannot be added to {source.name_or_path!r}: {one_line(error)}.") from error
    # PEFT takes these from the model, which knows neither the absolute folder nor a revision.
    peft_model.peft_config["default"].base_model_name_or_path = source.resolved_name_or_path
    _require_usable_initialisation(lora, peft_model, source)
    require_names_in_use(peft_model, lora)
    require_rows_trained(peft_model, new)
    require_untiable(peft_model)
    keep_inputs_uncast(peft_model)
    use_fast_lora_layers(peft_model, enable=lora.layers == "fast")
    return peft_model.train()


def _targets(model: PreTrainedModel, lora: LoRAOptions, source: BaseModelSource) -> LoRATargets:
    """Targets that name what PEFT will adapt; checks what goes with parameters among them."""
    if isinstance(lora.target_parameters, str) and lora.target_parameters != ALL_EXPERTS:
        raise ConfigurationError(
            f"lora.target_parameters={lora.target_parameters!r} is neither a list of names nor {ALL_EXPERTS!r}; give "
            "one of the two."
        )
    try:
        targets = lora_targets(
            model,
            lora.target_modules or None,
            lora.target_parameters,
            lora.exclude_modules,
            lora.layers_to_transform,
            lora.parts,
        )
    except ValueError as error:
        raise ConfigurationError(f"LoRA cannot be added to {source.name_or_path!r}: {one_line(error)}.") from error
    if lora.target_parameters == ALL_EXPERTS and not targets.target_parameters:
        raise ConfigurationError(
            f"lora.target_parameters is {ALL_EXPERTS!r}, and {source.name_or_path!r} has no stacked experts; leave it "
            "out."
        )
    if not targets.target_parameters:
        return targets
    unsuitable = {
        "dropout": lora.dropout > 0,
        "use_dora": lora.use_dora,
        "layers_to_transform": lora.layers_to_transform is not None,
        "init_lora_weights": isinstance(lora.init_lora_weights, str) and lora.init_lora_weights != "gaussian",
    }
    wrong = next((name for name, is_wrong in unsuitable.items() if is_wrong), None)
    if wrong is not None:
        some = ", ".join(targets.target_parameters[:3])
        raise ConfigurationError(
            f"lora.{wrong}={getattr(lora, wrong)!r} does not work for LoRA on parameters, and {source.name_or_path!r} "
            f"keeps what is to be adapted in such ({some}); leave lora.{wrong} out, or name other lora.target_modules."
        )
    return targets


def _require_usable_initialisation(lora: LoRAOptions, model: PeftModel, source: BaseModelSource) -> None:
    # PEFT decomposes transposed weights as if they were not, and the first forward pass fails.
    if lora.init_lora_weights == "olora" and any(getattr(layer, "fan_in_fan_out", False) for layer in model.modules()):
        raise ConfigurationError(
            f"lora.init_lora_weights='olora' does not work for the Conv1D layers of {source.name_or_path!r}; use "
            "'pissa' or true."
        )


@contextmanager
def _seeded_by_seed_everything() -> Iterator[None]:
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield
