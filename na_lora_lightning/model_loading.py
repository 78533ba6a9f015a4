"""Loads a Hugging Face causal language model and wraps it with LoRA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from na_lora_lightning.arguments import LoRAArguments
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lora_inputs import keep_inputs_uncast
from na_lora_lightning.target_names import require_names_in_use, require_names_of_model
from na_lora_lightning.targets import ALL_EXPERTS, LoRATargets, lora_targets, mark_transposed_experts
from na_lora_lightning.ties import require_untiable
from na_lora_lightning.versions import require_new_transformers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_HUB_TIMEOUT_SECONDS = 10.0
# Models that compare an image with a text, and generate none.
DUAL_ENCODERS = ("clip", "siglip", "siglip2")


@dataclass(frozen=True)
class BaseModelSource:
    """Where the base model comes from, and how it is loaded.

    Attributes:
        name_or_path: A folder or the name of a model on the hub.
        revision: Branch, tag or commit on the hub; None stands for its main branch.
        trust_remote_code: Whether the model may run code of its own.
        dtype: Of the weights; ``"auto"`` is the checkpoint's own on a CUDA device and float32 elsewhere.
        attention_implementation: As transformers names it (``"sdpa"``, ``"eager"``, ...); None lets it choose.
    """

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"
    attention_implementation: str | None = None

    @property
    def resolved_name_or_path(self) -> str:
        """The hub name, or the folder's absolute path, which stays right in other working directories."""
        folder = Path(self.name_or_path).expanduser()
        return str(folder.resolve()) if folder.is_dir() else self.name_or_path


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Turns an option into what transformers loads the weights in.

    Args:
        dtype: The option.
        device: Where the model will train. Outside CUDA devices, 16-bit arithmetic is emulated or slow by orders of
            magnitude, so ``"auto"`` means float32 there.

    Returns:
        The dtype, or ``"auto"`` for that of the checkpoint.
    """
    if dtype != "auto":
        resolved: torch.dtype = getattr(torch, dtype)
        return resolved
    return "auto" if device.type == "cuda" else torch.float32


def require_model(source: BaseModelSource) -> None:
    """Checks cheaply that there is a model to load, before anything slow begins.

    Raises:
        ConfigurationError: The folder or hub model does not exist, holds something else, or cannot be reached.
    """
    name = source.name_or_path
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        _require_model_folder(name, folder)
        return
    looks_like_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists()
    if looks_like_path or not name:
        raise ConfigurationError(
            f"The model folder {name!r} does not exist; give the folder of a model or its name on the hub."
        )
    _require_hub_model(source)


def _require_model_folder(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"The folder {name!r} holds a LoRA adapter and no model; give the base model, or merge the two with "
            "'na-lora merge' first."
        )
    raise ConfigurationError(f"The folder {name!r} holds no model (config.json is missing); give a model's folder.")


def _require_hub_model(source: BaseModelSource) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name = source.name_or_path
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=source.revision), str):
            return
        # One plain request: loading itself tries for most of a minute when there is no connection.
        HfApi().model_info(name, revision=source.revision, timeout=_HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ConfigurationError(_gated(name)) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(
            f"The model {name!r} has no revision {source.revision!r} on the hub; correct it or leave it out."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigurationError(
            f"There is neither a folder nor a hub model named {name!r} (or it is private and you are not logged in); "
            "correct the name."
        ) from error
    except Exception as error:
        # The HTTP library behind the hub client, and so the class of its errors, changes between versions.
        raise ConfigurationError(
            f"There is no folder {name!r}, and the hub, which may have a model of that name, cannot be reached "
            f"({type(error).__name__}); give a folder, or try again with a connection."
        ) from error


def _gated(name: str) -> str:
    return f"The model {name!r} is gated on the hub; accept its terms there and log in with 'hf auth login'."


def load_config(source: BaseModelSource) -> PreTrainedConfig:
    """Reads the configuration of a model; raises what transformers raises."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(
        source.resolved_name_or_path, revision=source.revision or "main", trust_remote_code=source.trust_remote_code
    )
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers with which a model is made: for images and text, or else a causal language model.

    Dual encoders such as CLIP are made with ``AutoModel``.

    Args:
        config: The model's configuration, whose ``architectures`` decides.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if getattr(config, "model_type", None) in DUAL_ENCODERS:
        return AutoModel
    with_images: set[str] = set()
    for names in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        with_images.update([names] if isinstance(names, str) else names)
    architecture = (getattr(config, "architectures", None) or [None])[0]
    return AutoModelForImageTextToText if architecture in with_images else AutoModelForCausalLM


def load_base_model(source: BaseModelSource, device: torch.device) -> PreTrainedModel:
    """Loads the base model, from safetensors files only.

    Args:
        source: Which model, and how.
        device: Where it will train; the weights are loaded to the CPU, or wherever the surrounding context says.

    Returns:
        The model, in evaluation mode and with all its parameters set.

    Raises:
        ConfigurationError: There is no such model, it lacks weights, or transformers is too old.
    """
    require_new_transformers()
    require_model(source)
    options: dict[str, Any] = {
        "revision": source.revision or "main",
        "trust_remote_code": source.trust_remote_code,
        "dtype": resolve_dtype(source.dtype, device),
        "use_safetensors": True,
    }
    if source.attention_implementation is not None:
        options["attn_implementation"] = source.attention_implementation
    name = source.resolved_name_or_path
    loaded: Any
    try:
        with without_progress_bars():
            loaded = auto_class(load_config(source)).from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:
        # Configurations with values of the wrong kind go wrong wherever a model's code meets them.
        if "gated repo" in str(error):
            raise ConfigurationError(_gated(source.name_or_path)) from error
        raise ConfigurationError(
            f"The model {source.name_or_path!r} cannot be loaded ({one_line(error)}); give a causal language model, or "
            "one for images and text, with safetensors weights."
        ) from error
    model: PreTrainedModel
    model, loading = loaded
    _require_all_weights(source, loading)
    mark_transposed_experts(model)
    return model


def _require_all_weights(source: BaseModelSource, loading: Mapping[str, Any]) -> None:
    # transformers makes up what is missing at random, and LoRA on a random layer trains without an error.
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in loading.get("mismatched_keys", ()))
    if missing or mismatched:
        raise ConfigurationError(
            f"The model {source.name_or_path!r} lacks weights (such as "
            f"{(missing + mismatched)[0]!r}); give a complete checkpoint."
        )


def add_lora(model: PreTrainedModel, lora: LoRAArguments, source: BaseModelSource) -> PeftModel:
    """Wraps a model with LoRA.

    After :func:`lightning.pytorch.seed_everything` the initial LoRA weights are a function of its seed alone, so that
    runs that differ in data, callbacks or options start from the same adapter; the random state is left as it was.

    Args:
        model: The base model; its parameters are frozen.
        lora: Which layers, and what kind of LoRA.
        source: Where ``model`` came from, to be named in the adapter.

    Returns:
        The PEFT model in training mode, its LoRA parameters in float32, of whose inputs no float32 copy is kept.

    Raises:
        ConfigurationError: The options do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    require_names_of_model(model, lora)
    targets = _targets(model, lora, source)
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
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
    )
    try:
        with _seeded_by_seed_everything(), warnings.catch_warnings():
            # PEFT corrects the setting by itself, layer by layer, and says so for each.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT asks transformers by the old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # Refused here, where names can be suggested.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            # Merging gives adapted layers weights of their own.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            peft_model: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ConfigurationError(f"LoRA cannot be added to {source.name_or_path!r}: {one_line(error)}.") from error
    # PEFT takes these from the model, which knows neither the absolute folder nor a revision.
    peft_model.peft_config["default"].base_model_name_or_path = source.resolved_name_or_path
    _require_usable_initialisation(lora, peft_model, source)
    require_names_in_use(peft_model, lora)
    require_untiable(peft_model)
    keep_inputs_uncast(peft_model)
    return peft_model.train()


def _targets(model: PreTrainedModel, lora: LoRAArguments, source: BaseModelSource) -> LoRATargets:
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


def _require_usable_initialisation(lora: LoRAArguments, model: PeftModel, source: BaseModelSource) -> None:
    # PEFT decomposes transposed weights as if they were not, and the first forward pass fails.
    if lora.init_lora_weights == "olora" and any(getattr(layer, "fan_in_fan_out", False) for layer in model.modules()):
        raise ConfigurationError(
            f"lora.init_lora_weights='olora' does not work for the Conv1D layers of {source.name_or_path!r}; use "
            "'pissa' or true."
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Has the model recompute its blocks' activations in the backward pass, to save memory.

    Raises:
        ConfigurationError: The model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing to false."
        )
    # transformers is renaming the method.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{prefix}_checkpointing_enable")
    enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    # Without it no input of a checkpointed block requires a gradient, and LoRA inside may silently not train.
    model.enable_input_require_grads()


def one_line(error: BaseException) -> str:
    """The first sentence or line of an error's message, to be put inside another sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.split(". ")[0].rstrip(".:")


@contextmanager
def _seeded_by_seed_everything() -> Iterator[None]:
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar per file of weights, which would break into that of the trainer."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
