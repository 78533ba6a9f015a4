"""Which base model, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from na_lora_lightning.data.text.tokenizer import require_new_tokens
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.quantization import QuantizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        quantization: In what form its weights are held.
        new_tokens: Texts that are tokens, for which the model is given rows where it has none.

    Raises:
        ConfigurationError: The dtype is unknown, or a token is none.
    """

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"
    attention_implementation: str | None = None
    quantization: QuantizationOptions = QuantizationOptions()
    new_tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        # Sources are compared, and are keys.
        object.__setattr__(self, "new_tokens", require_new_tokens(self.new_tokens))
        if self.dtype not in get_args(Dtype):
            raise ConfigurationError(
                f"dtype={self.dtype!r} is unknown; use 'auto', 'float32', 'bfloat16' or 'float16'."
            )

    @property
    def resolved_name_or_path(self) -> str:
        """The hub name, or the folder's absolute path, which stays right in other working directories."""
        folder = Path(self.name_or_path).expanduser()
        return str(folder.resolve()) if folder.is_dir() else self.name_or_path


def resolve_dtype(dtype: Dtype, device: torch.device | None) -> torch.dtype | Literal["auto"]:
    """Turns an option into what transformers loads the weights in.

    Args:
        dtype: The option.
        device: Where the model will train; None if it will not. Outside CUDA devices, 16-bit arithmetic is emulated or
            slow by orders of magnitude, so ``"auto"`` means float32 there.

    Returns:
        The dtype, or ``"auto"`` for that of the checkpoint.
    """
    if dtype != "auto":
        resolved: torch.dtype = getattr(torch, dtype)
        return resolved
    return "auto" if device is None or device.type == "cuda" else torch.float32


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
            f"the model folder {name!r} does not exist; give the folder of a model or its name on the hub."
        )
    _require_hub_model(source)


def _require_model_folder(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"the folder {name!r} holds a LoRA adapter and no model; give the base model, or merge the two with "
            "'na-lora merge' first."
        )
    raise ConfigurationError(f"the folder {name!r} holds no model (config.json is missing); give a model's folder.")


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
        raise ConfigurationError(gated_remedy(name)) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(
            f"the model {name!r} has no revision {source.revision!r} on the hub; correct it or leave it out."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigurationError(
            f"there is neither a folder nor a hub model named {name!r} (or it is private and you are not logged in); "
            "correct the name."
        ) from error
    except Exception as error:
        # The HTTP library behind the hub client, and so the class of its errors, changes between versions.
        raise ConfigurationError(
            f"there is no folder {name!r}, and the hub, which may have a model of that name, cannot be reached "
            f"({type(error).__name__}); give a folder, or try again with a connection."
        ) from error


def gated_remedy(name: str) -> str:
    """What to do about a gated model, as one sentence."""
    return f"the model {name!r} is gated on the hub; accept its terms there and log in with 'hf auth login'."


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
