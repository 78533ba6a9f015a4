"""Tokens that a vocabulary lacks: their ids, rows for them in a model, and which rows of it are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from na_lora_lightning.data.text.tokenizer import add_tokens, load_tokenizer
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.peft_internals import is_left_by_merge, is_target, trains_tokens

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from na_lora_lightning.arguments import LoRAOptions
    from na_lora_lightning.models.source import BaseModelSource


def token_ids(source: BaseModelSource) -> list[int]:
    """The ids of a model's new tokens, in the order in which they are given.

    Raises:
        ConfigurationError: The model has no tokenizer, or one that takes no tokens.
    """
    if not source.new_tokens:
        return []
    name, options = source.resolved_name_or_path, {"trust_remote_code": source.trust_remote_code}
    return add_tokens(load_tokenizer(name, revision=source.revision, **options), source.new_tokens)


def require_same_ids(tokenizer: PreTrainedTokenizerBase, source: BaseModelSource) -> None:
    """Checks that data is read with a model's new tokens.

    Args:
        tokenizer: Of the data.
        source: The model.

    Raises:
        ConfigurationError: It is not.
    """
    for token, index in zip(source.new_tokens, token_ids(source), strict=True):
        found = tokenizer.encode(token, add_special_tokens=False)
        if found != [index]:
            raise ConfigurationError(
                f"the tokenizer of the data reads {token!r} as the ids {found}, and it is the new token {index} of the "
                f"model; give the data module new_tokens={list(source.new_tokens)} and the model's own tokenizer."
            )


def make_room(model: PreTrainedModel, ids: Collection[int]) -> None:
    """Gives a model rows for tokens, in its embedding and in its output head, where it has none.

    Each is the mean of the rows that are there, around which transformers draws those that it adds. Drawn
    ones would make another base in each process, and each time that the model is read.

    Args:
        model: The base model, which may be on the meta device; changed in place.
        ids: Those of the tokens.

    Raises:
        ConfigurationError: Its embeddings cannot be resized.
    """
    rows = max(ids, default=-1) + 1
    if not rows:
        return
    try:
        before = [len(module.weight) for module in _embeddings(model)]
        if min(before) >= rows:
            return
        rows = max(rows, *before)
        with _random_state_kept(), torch.no_grad():
            model.resize_token_embeddings(rows, mean_resizing=False)
            for module, count in zip(_embeddings(model), before, strict=True):
                for values in (module.weight, getattr(module, "bias", None)):
                    if values is not None:
                        values[count:rows] = values[:count].mean(dim=0, dtype=torch.float32).to(values)
        if any(len(module.weight) != rows for module in _embeddings(model)):
            raise ValueError("they keep their size")
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigurationError(
            f"the embeddings of {type(model).__name__} cannot be resized ({one_line(error).rstrip('.')}), and it has "
            f"no row for the token {rows - 1}; leave model.new_tokens out, or give a model that has rows for them."
        ) from error


def _embeddings(model: PreTrainedModel) -> list[Any]:
    """The embedding, and the output head if it has weights of its own."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding.weight else [embedding, head]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    # Rows are drawn first, and then given their values.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def trained_rows(
    model: PreTrainedModel, lora: LoRAOptions, new: Collection[int]
) -> list[int] | dict[str, list[int]] | None:
    """The rows that are trained, of the embedding alone or by the names of modules, as PEFT takes them.

    Args:
        model: The base model.
        lora: With tokens whose rows are trained besides.
        new: Ids of new tokens, which have rows. An output head with weights of its own could not say them if it were
            not trained as well.

    Raises:
        ConfigurationError: The model lacks a token, or its embedding is trained in full.
    """
    given = lora.trainable_token_indices
    if not given and not new:
        return None
    option = "model.new_tokens" if new else "lora.trainable_token_indices"
    modules, (embedding, *heads) = dict(model.named_modules()), _embeddings(model)
    names = {module: name for name, module in modules.items()}
    rows: dict[str, set[int]] = {names[embedding]: set(new)}
    for head in heads:
        if new and not _holder(modules, lora.modules_to_save, head):
            rows[names[head]] = set(new)
    for key, ids in given.items() if isinstance(given, dict) else [(names[embedding], given or [])]:
        name = next((name for name in rows if name.endswith(key)), key)
        rows[name] = rows.get(name, set()) | set(ids)
    count = len(embedding.weight)
    wrong = next((index for ids in rows.values() for index in sorted(ids) if not 0 <= index < count), None)
    if wrong is not None:
        raise ConfigurationError(
            f"lora.trainable_token_indices names {wrong}, and the model has embeddings of the tokens 0 to {count - 1}; "
            "leave it out."
        )
    saved = _holder(modules, lora.modules_to_save, embedding)
    if saved is not None:
        raise ConfigurationError(
            f"lora.modules_to_save trains {saved!r} in full, and {option} some of its rows; leave one of the two out."
        )
    found = {name: sorted(ids) for name, ids in rows.items() if ids}
    return found[names[embedding]] if [*found] == [names[embedding]] else found


def _holder(modules: dict[str, nn.Module], endings: list[str] | None, module: Any) -> str | None:
    """The one of ``modules_to_save`` that names a module."""
    named = (
        ending for ending in endings or () for name in modules if name.endswith(ending) and modules[name] is module
    )
    return next(named, None)


def require_rows_free(model: PreTrainedModel, config: LoraConfig) -> None:
    """Checks that no LoRA is on what rows of tokens are trained of, which PEFT runs or merges by halves.

    Args:
        model: The base model.
        config: Of the LoRA to come.

    Raises:
        ConfigurationError: There is one.
    """
    if not config.trainable_token_indices or not config.target_modules:
        return
    rows = config.trainable_token_indices
    embeddings = _embeddings(model) if isinstance(rows, dict) else _embeddings(model)[:1]
    weights = [module.weight for module in embeddings]
    for name, module in model.named_modules():
        if any(getattr(module, "weight", None) is weight for weight in weights) and is_target(config, name):
            raise ConfigurationError(
                f"LoRA is to adapt {name!r}, of which rows of tokens are trained as well, and PEFT cannot do both; "
                "leave it out of lora.target_modules."
            )


def require_rows_trained(model: PeftModel, new: Collection[int]) -> None:
    """Checks that PEFT trains the rows of new tokens, and that what it computes with them is right.

    Args:
        model: The PEFT model.
        new: Ids of new tokens.

    Raises:
        ConfigurationError: It does not.
    """
    for name, layer in model.named_modules():
        if not trains_tokens(layer):
            continue
        base: Any = layer.get_base_layer()
        plain = name.removeprefix("base_model.model.").removesuffix(".token_adapter")
        if isinstance(base, nn.Linear) and base.bias is not None:
            raise ConfigurationError(
                f"PEFT leaves the bias of {plain!r} out where it trains rows of tokens; leave model.new_tokens and "
                "lora.trainable_token_indices out."
            )
    root: Any = model.get_base_model()
    head = root.get_output_embeddings()
    if new and head is not None and not is_left_by_merge(head):
        raise ConfigurationError(
            f"PEFT does not train the output head of {type(root).__name__}, which could not say the new tokens; leave "
            "model.new_tokens out."
        )
