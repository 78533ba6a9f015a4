"""Adapters that are there already: where a folder keeps one, what LoRA it is, and its weights in a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.data.text.tokenizer import add_tokens, has_tokenizer, load_tokenizer
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.new_tokens import make_room
from na_lora_lightning.models.quantization import QuantizationOptions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from na_lora_lightning.models.source import BaseModelSource

# PEFT says of tied weights what merging takes care of.
TIED = r"(Model with|Model has) `tie_word_embeddings=True`|Input and output embeddings are no longer tied"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAMES_OF_PEFT = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
# What the other files of PEFT's say besides the kind of LoRA.
_NOT_OF_LORA = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
# Initialisations that leave the base as it is matter no more once there are weights.
_ONLY_BEFORE = ("gaussian", "orthogonal", "eva", "mica")


def adapter_folder(place: str | Path) -> Path:
    """The folder of an adapter, which may be that of a run with one in it.

    Raises:
        ConfigurationError: There is none.
    """
    folder = Path(place).expanduser()
    if folder.is_file():
        raise ConfigurationError(
            f"the adapter {str(place)!r} is a file; give the folder of an adapter or of a run, or of a checkpoint make "
            "a model with 'na-lora merge' (evaluations take it with --ckpt_path)."
        )
    found = next((path for path in (folder, folder / "adapter") if (path / _CONFIG).is_file()), None)
    if found is None:
        saved = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if saved:
            raise ConfigurationError(
                f"the run {str(place)!r} has not ended and holds no adapter, but checkpoints; let it go on with "
                f"'na-lora fit --ckpt_path last', or make a model of one, such as {str(saved[-1])!r}, with "
                "'na-lora merge'."
            )
        raise ConfigurationError(
            f"the folder {str(place)!r} holds no adapter ({_CONFIG} is missing); give the folder of an adapter, or of "
            "a run that has ended."
        )
    if not (found / _WEIGHTS).is_file():
        raise ConfigurationError(f"the adapter {str(found)!r} has no {_WEIGHTS}; save it again.")
    return found


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT wrote about an adapter.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{_CONFIG} of the adapter {str(folder)!r} cannot be read ({one_line(error)}).") from (
            error
        )
    return config


def require_own_base(folder: Path, quantization: QuantizationOptions, on_command_line: bool = False) -> None:
    """Checks, before it is loaded, that a base will be the one to which an adapter belongs.

    Args:
        folder: The adapter's.
        quantization: How the base is held.
        on_command_line: Whether that is said by ``--quantization``, and not by options of a module.

    Raises:
        ConfigurationError: The adapter began with what another quantisation lost.
    """
    own = BaseQuantization.of_folder(folder)
    if own is not None:
        remedy = f"give {own.arguments}" if on_command_line else own.settings
        own.require(f"the adapter {str(folder)!r}", quantization.kind, quantization.double, remedy)


def lora_of_adapter(folder: Path, given: LoRAOptions) -> LoRAOptions:
    """The options of LoRA under which an adapter trains on.

    Args:
        folder: That of the adapter.
        given: Options whose values, where they are not the defaults, take the place of the adapter's own.

    Returns:
        All of them.

    Raises:
        ConfigurationError: It is no LoRA, or of a kind that has no option here.
    """
    from peft import LoraConfig

    config, defaults = read_adapter_config(folder), LoRAOptions()
    if config.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"the adapter {str(folder)!r} is of the kind {config.get('peft_type')}, and here LoRA is trained; merge it "
            "into its base model and train a new one."
        )
    options: dict[str, Any] = {"parts": ["language", "vision", "projector"]}
    known = {field.name for field in fields(LoRAOptions)}
    plain = LoraConfig()
    for name, value in config.items():
        option = _NAMES_OF_PEFT.get(name, name)
        # PEFT's own LoftQ quantises the base again whenever the adapter is loaded.
        is_own = name == "init_lora_weights" and value == "loftq"
        if option in known and not is_own:
            options[option] = value
        elif is_own or (name not in _NOT_OF_LORA and value and value != getattr(plain, name, None)):
            raise ConfigurationError(
                f"the adapter {str(folder)!r} has {name}={value!r}, for which there is no option here; use it with "
                "PEFT, or merge it and train a new one."
            )
    options = {name: _or_default(name, value, defaults) for name, value in options.items()}
    if isinstance(options.get("target_modules"), list):
        # PEFT also writes names that exclude_modules leaves nothing of.
        adapted = _tensor_names(folder)
        named = [name for name in options["target_modules"] if any(f".{name}." in tensor for tensor in adapted)]
        options["target_modules"] = named or options["target_modules"]
    if options.get("init_lora_weights") in _ONLY_BEFORE:
        options["init_lora_weights"] = True
    if BaseQuantization.of_folder(folder) is not None:
        options["init_lora_weights"] = "loftq"
    of_adapter = LoRAOptions(**options)
    begins, asked = of_adapter.init_lora_weights, given.init_lora_weights
    if "loftq" in (begins, asked) and asked not in (True, begins):
        raise ConfigurationError(
            f"the adapter {str(folder)!r} began with init_lora_weights={begins!r}, and lora.init_lora_weights is "
            f"{asked!r}; leave it out."
        )
    changed = {
        field.name: getattr(given, field.name)
        for field in fields(LoRAOptions)
        # What is in no part of the model that was adapted is named in the adapter's own exclude_modules.
        if field.name != "parts" and getattr(given, field.name) != getattr(defaults, field.name)
    }
    return replace(of_adapter, **changed)


def _or_default(name: str, value: Any, defaults: LoRAOptions) -> Any:
    """Nothing where PEFT says None, but for options that can be None here too."""
    if value is None:
        return [] if name == "target_modules" else getattr(defaults, name)
    return value


def with_adapter(model: PreTrainedModel, folder: Path, base: str) -> PeftModel:
    """Puts an adapter of any kind onto a model, for use and not for training.

    Args:
        model: The base model, which is given rows for tokens that the adapter adds.
        folder: The adapter's.
        base: What the base model is called.

    Raises:
        ConfigurationError: It belongs to another model, or to one that PEFT makes on a GPU alone.
    """
    import torch
    from peft import PeftModel

    if read_adapter_config(folder).get("init_lora_weights") == "loftq" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"the adapter {str(folder)!r} has init_lora_weights='loftq', for which PEFT quantises its base again on a "
            "GPU, and there is none; use it on a machine with one."
        )
    try:
        with warnings.catch_warnings():
            # Said of an adapter that lacks layers; it is refused below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=TIED)
            make_room(model, _trained_tokens(folder))
            adapted = PeftModel.from_pretrained(model, str(folder))
        require_every_tensor(adapted, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"the adapter {str(folder)!r} does not fit the base model {base!r} ({one_line(error)}); give the base "
            "that it was trained on."
        ) from error
    return adapted


def _trained_tokens(folder: Path) -> set[int]:
    """Ids of the tokens whose rows an adapter has."""
    indices = read_adapter_config(folder).get("trainable_token_indices") or []
    return {index for ids in (indices.values() if isinstance(indices, dict) else [indices]) for index in ids}


def with_tokens_of_adapter(source: BaseModelSource, folder: Path) -> BaseModelSource:
    """A base model with the tokens that an adapter adds to it: those that its tokenizer has and the base's lacks.

    Args:
        source: The base model, with the same tokens or none.
        folder: The adapter's.

    Raises:
        ConfigurationError: It is given others.
    """
    trained, trust = _trained_tokens(folder), source.trust_remote_code
    own: dict[int, str] = {}
    given = dict(enumerate(source.new_tokens))
    if has_tokenizer(folder) and (trained or given):
        try:
            base = load_tokenizer(source.resolved_name_or_path, revision=source.revision, trust_remote_code=trust)
        except ConfigurationError:
            if given:
                raise
            # Nothing can be read with the base's own tokenizer, then.
            return source
        known = {str(token) for token in base.added_tokens_decoder.values()}
        added = load_tokenizer(str(folder), revision=None, trust_remote_code=trust).added_tokens_decoder
        own = {index: str(added[index]) for index in sorted(trained & set(added)) if str(added[index]) not in known}
        ids = zip(add_tokens(base, source.new_tokens), source.new_tokens, strict=True)
        given = {index: token for index, token in ids if token not in known}
    if source.new_tokens and given != own:
        raise ConfigurationError(
            f"the adapter {str(folder)!r} has the new tokens {list(own.values())}, and model.new_tokens is "
            f"{list(source.new_tokens)}; leave model.new_tokens out."
        )
    return replace(source, new_tokens=source.new_tokens or list(own.values()))


def _tensor_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return set(file.keys())


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Gives a PEFT model the weights of an adapter.

    Args:
        model: With LoRA of the same kind.
        folder: The adapter's.

    Raises:
        ConfigurationError: It has other tensors, or means something else by them.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        _require_same_scale(read_adapter_config(folder), vars(model.peft_config["default"]))
        require_every_tensor(model, folder)
        set_peft_model_state_dict(model, load_file(folder / _WEIGHTS))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"the adapter {str(folder)!r} does not fit this model and its LoRA ({one_line(error)}); give the base "
            "model that it was trained on, and leave the options of model.lora out."
        ) from error


def _require_same_scale(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if name in saved and saved[name] != current[name]:
            raise ValueError(f"it has {name}={saved[name]!r}, and here it is {current[name]!r}")
    moving = [config.get("init_lora_weights") for config in (saved, current)]
    then, now = (kind if str(kind).startswith(("pissa", "olora", "loftq", "corda")) else True for kind in moving)
    if then != now:
        raise ValueError(f"it has init_lora_weights={then!r}, which changes the base model, and here it is {now!r}")


def require_every_tensor(model: PeftModel, folder: Path) -> None:
    """Checks that an adapter's file has the tensors of a model's LoRA, all of them and no others.

    Raises:
        ValueError: One is in the file or the model alone; PEFT takes a part for the whole.
    """
    from peft import get_peft_model_state_dict

    saved = _tensor_names(folder)
    current = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Beside an adapter PEFT may store embeddings, which are weights of the base model.
    other = (current - saved) | (saved - current - set(model.state_dict()))
    if other:
        raise ValueError(f"{min(other)} is in one and not in the other")
