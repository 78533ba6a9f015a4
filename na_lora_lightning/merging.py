"""Merges an adapter into its base model: the result is an ordinary model without LoRA."""

from __future__ import annotations

import argparse
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.model_loading import BaseModelSource, Dtype, load_base_model, one_line, without_progress_bars

if TYPE_CHECKING:
    from peft import PeftModel


_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class MergeArguments:
    """What to merge, and where to.

    Attributes:
        adapter: An adapter folder, or a checkpoint file of this package.
        output: The folder to write model, tokenizer and processor to.
        base: Folder or hub name of the base model; None stands for the one that the adapter names.
        dtype: Of the merged weights; ``"auto"`` is that of the base checkpoint.
        overwrite: Accept that ``output`` already has files.
        trust_remote_code: Whether the base model may run code of its own.
    """

    adapter: Path
    output: Path
    base: str | None = None
    dtype: Dtype = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False


def merge_adapter(arguments: MergeArguments) -> Path:
    """Writes the merged model as safetensors, with the base model's tokenizer and, for images, its processor.

    Returns:
        The output folder.

    Raises:
        ConfigurationError: There is no such adapter, it does not fit the base model, or the output is not empty.
    """
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"The output {str(output)!r} is a file; give a folder.")
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise ConfigurationError(
            f"The output folder {str(output)!r} is not empty; give another, or --overwrite to replace files in it."
        )
    if arguments.adapter.is_file():
        model, source = _from_checkpoint(arguments)
    else:
        model, source = _from_folder(arguments)
    merged = model.merge_and_unload(safe_merge=True)
    with without_progress_bars():
        merged.save_pretrained(output, safe_serialization=True)
    _copy_tokenizer(source, output)
    return output


def _from_folder(arguments: MergeArguments) -> tuple[PeftModel, BaseModelSource]:
    from peft import PeftConfig, PeftModel

    adapter = arguments.adapter
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"The folder {str(adapter)!r} holds no adapter (adapter_config.json is missing); give an adapter folder or "
            "a .ckpt file."
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigurationError(f"The adapter {str(adapter)!r} has no adapter_model.safetensors; save it again.")
    config = PeftConfig.from_pretrained(str(adapter))
    base = arguments.base or config.base_model_name_or_path
    if not base:
        raise ConfigurationError(f"The adapter {str(adapter)!r} does not name its base model; give it with --base.")
    revision = None if arguments.base else config.revision
    source = BaseModelSource(base, revision, arguments.trust_remote_code, arguments.dtype)
    # As on a CUDA device, "auto" is the checkpoint's dtype: the merged model is to be as large as the base.
    model = load_base_model(source, torch.device("cuda"))
    try:
        with warnings.catch_warnings():
            # Said of an adapter that lacks layers; it is refused below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(adapter))
        _require_every_tensor(adapted, adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"The adapter {str(adapter)!r} does not fit the base model {base!r} ({one_line(error)}); give the base "
            "that it was trained on."
        ) from error
    return adapted, source


def _require_every_tensor(model: PeftModel, adapter: Path) -> None:
    """Checks that a model has LoRA exactly where the adapter's file has, as PEFT takes a part for the whole."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118  # no mapping, whatever its method
    current = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in name}
    if saved != current:
        raise ValueError(f"{min(saved ^ current)} is in one and not in the other")


def _from_checkpoint(arguments: MergeArguments) -> tuple[PeftModel, BaseModelSource]:
    from na_lora_lightning.module import NALoRALightningModule

    path = arguments.adapter
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.base is not None:
        options["model_name_or_path"] = arguments.base
    if arguments.dtype != "auto":
        options["dtype"] = arguments.dtype
    try:
        module = NALoRALightningModule.load_from_checkpoint(path, map_location="cpu", **options)
    except ConfigurationError:
        raise
    except Exception as error:
        # Whatever a file that is no checkpoint makes torch raise.
        raise ConfigurationError(
            f"The file {str(path)!r} is no checkpoint of this package ({one_line(error)}); give an adapter folder or a "
            ".ckpt file of 'na-lora fit'."
        ) from error
    return module.peft_model, module.source


def _copy_tokenizer(source: BaseModelSource, output: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.resolved_name_or_path,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        rank_zero_warn(
            f"The base model {source.name_or_path!r} has no tokenizer that can be loaded ({one_line(error)}), so the "
            "merged model is without one."
        )
        return
    tokenizer.save_pretrained(output)
    _copy_processor(source, output)


def _copy_processor(source: BaseModelSource, output: Path) -> None:
    """Copies what a model for images needs besides; as files, so that parts not usable here are kept."""
    from transformers.utils import cached_file

    for name in _PROCESSOR_FILES:
        found = cached_file(
            source.resolved_name_or_path,
            name,
            revision=source.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, output / name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see 'na-lora merge --help'.")


def main(arguments: list[str]) -> int:
    """Runs ``na-lora merge``.

    Args:
        arguments: The command line after ``merge``.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: The user has something to correct.
    """
    parser = _Parser(prog="na-lora merge", description="Merges an adapter into its base model.")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, or .ckpt file of a fit")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of the base model (default: the one the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the merged weights (default: auto, that of the base checkpoint)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of a non-empty output folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the base model run code of its own")
    folder = merge_adapter(MergeArguments(**vars(parser.parse_args(arguments))))
    print(f"Merged model {folder}")
    return 0
