"""Merges an adapter into its base model: the result is an ordinary model without LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from na_lora_lightning.checkpoints.adapter_folder import end_token_ids
from na_lora_lightning.checkpoints.adapter_state import CHECKPOINT_KEY, own_base_of_checkpoint
from na_lora_lightning.cli.adapters import base_of_adapter
from na_lora_lightning.cli.errors import CommandParser
from na_lora_lightning.cli.merge_output import (
    copy_tokenizer,
    push,
    refuse_inputs_as_output,
    require_output,
    require_repository_name,
    require_shard_size,
    written_whole,
)
from na_lora_lightning.data.answers import stop_at
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.quantization import Kind, QuantizationOptions, dequantized, stored_quantization
from na_lora_lightning.models.saved_adapter import TIED, adapter_folder, require_own_base, with_adapter
from na_lora_lightning.models.source import BaseModelSource, Dtype, load_config, require_model, without_progress_bars
from na_lora_lightning.models.ties import has_ties, match_config, unmerged, untie_adapted_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MergeOptions:
    """What to merge, and where to.

    Attributes:
        adapter: An adapter folder, or a checkpoint file of this package.
        output: The folder to write model, tokenizer and processor to.
        base: Folder or hub name of the base model; None stands for the one that the adapter names.
        dtype: Of the merged weights; ``"auto"`` is that of the base checkpoint.
        overwrite: Accept that ``output`` already has files.
        trust_remote_code: Whether the base model may run code of its own.
        quantization: Quantise the base as the fit did, and merge into the ordinary weights that the quantised ones
            stand for, so that the merged model says what was trained. None merges into the base as it is stored.
        double_quantization: Whether the scales are quantised too.
        dequantize: Make ordinary weights of those of a base that is stored in a quantised form.
        max_shard_size: The largest file of weights, such as ``"5GB"``.
        push_to: Name of a repository on the hub that is given the merged model too.
        private: Whether that repository, if it is a new one, is private.

    Raises:
        ConfigurationError: A size or a name is none.
    """

    adapter: Path
    output: Path
    base: str | None = None
    dtype: Dtype = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False
    quantization: Kind | None = None
    double_quantization: bool = True
    dequantize: bool = False
    max_shard_size: str = "5GB"
    push_to: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        require_shard_size(self.max_shard_size)
        if self.push_to is not None:
            require_repository_name(self.push_to)


def merge_adapter(arguments: MergeOptions) -> Path:
    """Writes the merged model as safetensors, with the base model's tokenizer and, for images, its processor.

    Returns:
        The output folder.

    Raises:
        ConfigurationError: There is no such adapter, it does not fit the base model, or the output is not empty.
    """
    output = arguments.output
    if not arguments.adapter.is_file():
        arguments = replace(arguments, adapter=adapter_folder(arguments.adapter))
    refuse_inputs_as_output(output, arguments.adapter, arguments.base)
    require_output(output, overwrite=arguments.overwrite)
    if arguments.adapter.is_file():
        model, source = _from_checkpoint(arguments)
    else:
        model, source = _from_folder(arguments)
    merged = merge_into_base(model)
    settings = getattr(merged, "generation_config", None)
    if settings is not None:
        stop_at(settings, end_token_ids(arguments.adapter))
        # Some models are published with settings that save_pretrained refuses.
        merged.generation_config = type(settings)()
    with written_whole(output) as folder:
        with without_progress_bars():
            merged.save_pretrained(folder, safe_serialization=True, max_shard_size=arguments.max_shard_size)
        if settings is not None:
            settings.to_json_file(folder / "generation_config.json")
        copy_tokenizer(source, folder, arguments.adapter)
    if arguments.push_to is not None:
        push(output, arguments.push_to, private=arguments.private)
    return output


def merge_into_base(model: PeftModel) -> PreTrainedModel:
    """Puts the adapter of a model into its weights, those of adapted layers alone where others share them.

    Args:
        model: The PEFT model, which is used up.

    Returns:
        The model without adapter, whose configuration says what is tied in it.

    Raises:
        ConfigurationError: PEFT cannot merge this kind of adapter, or the merged model could not be stored.
    """
    kind = str(getattr(model.peft_config[model.active_adapter].peft_type, "value", "unknown"))
    if not hasattr(model, "merge_and_unload"):
        raise ConfigurationError(f"the adapter is of the kind {kind}, which adds to the inputs; use it as it is.")
    base: Any = model.get_base_model()
    with_ties, tied = has_ties(base), getattr(base.config, "tie_word_embeddings", None)
    untie_adapted_weights(model)
    try:
        with warnings.catch_warnings():
            # They are parted here, and the configuration is made to say so.
            warnings.filterwarnings("ignore", message=TIED)
            merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"PEFT cannot merge this adapter ({kind}: {one_line(error)}); use it as it is."
        ) from error
    left = unmerged(merged)
    if left is not None:
        raise ConfigurationError(
            f"PEFT cannot merge this adapter ({kind}: {left!r} has two of its parts); use it as it is."
        )
    if tied:
        # PEFT has a look at two of the weights alone.
        merged.config.tie_word_embeddings = tied
    if with_ties and match_config(merged):
        rank_zero_info(
            "The adapter changes weights that other layers shared, so the merged model stores both, and "
            "tie_word_embeddings is false in its config."
        )
    return merged


def _from_folder(arguments: MergeOptions) -> tuple[PeftModel, BaseModelSource]:
    adapter = arguments.adapter
    quantization = QuantizationOptions(arguments.quantization, arguments.double_quantization)
    require_own_base(adapter, quantization, on_command_line=True)
    base, revision = (arguments.base, None) if arguments.base else base_of_adapter(adapter)
    refuse_inputs_as_output(arguments.output, adapter, base)
    source = BaseModelSource(base, revision, arguments.trust_remote_code, arguments.dtype, quantization=quantization)
    _require_base(source, arguments)
    # Nothing is trained, so that "auto" is the checkpoint's dtype: the merged model is to be as large as the base.
    model = dequantized(load_base_model(source, device=None), base)
    return with_adapter(model, adapter, base), source


def _require_base(source: BaseModelSource, arguments: MergeOptions) -> None:
    """Checks that there is a base whose weights an adapter can be added to."""
    try:
        require_model(source)
    except ConfigurationError as error:
        if arguments.base is not None:
            raise
        raise ConfigurationError(
            f"the base model that the adapter {str(arguments.adapter)!r} names cannot be had "
            f"({str(error).partition(';')[0]}); give it with --base."
        ) from error
    _require_weights(source, arguments)


def _require_weights(source: BaseModelSource, arguments: MergeOptions) -> None:
    """Refuses a base model whose weights are stored in a quantised form, unless they are to become ordinary ones.

    Raises:
        ConfigurationError: It is one.
    """
    try:
        method = stored_quantization(load_config(source))
    except (OSError, ValueError, ImportError, KeyError):
        # Said when the model itself is loaded.
        return
    if method is not None and not arguments.dequantize:
        raise ConfigurationError(
            f"the base model {source.name_or_path!r} is quantised ({method}), and its weights would lose what an "
            "adapter adds to them; give --dequantize, which makes ordinary ones of them, or with --base the model that "
            "it was made from."
        )


def _from_checkpoint(arguments: MergeOptions) -> tuple[PeftModel, BaseModelSource]:
    from na_lora_lightning.modules.language import NALoRALightningModule

    path = arguments.adapter
    quantization = QuantizationOptions(arguments.quantization, arguments.double_quantization)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        own, saved = own_base_of_checkpoint(checkpoint.get(CHECKPOINT_KEY, {})), checkpoint["hyper_parameters"]
        source = BaseModelSource(
            arguments.base or saved["model_name_or_path"],
            None if arguments.base else saved["revision"],
            arguments.trust_remote_code,
        )
    except Exception as error:
        # Whatever a file that is not a checkpoint makes torch raise.
        raise _no_checkpoint(path, error) from error
    if own is not None:
        own.require(f"the checkpoint {str(path)!r}", quantization.kind, quantization.double, f"give {own.arguments}")
    refuse_inputs_as_output(arguments.output, path, source.name_or_path)
    _require_base(source, arguments)
    dtype: str = arguments.dtype
    if dtype == "auto":
        # Left to itself the module would take 32 bits on this device.
        stored = str(load_config(source).dtype).removeprefix("torch.")
        dtype = stored if stored in get_args(Dtype) else "auto"
    options: dict[str, Any] = {
        "model_name_or_path": source.name_or_path,
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
        "dtype": dtype,
        "quantization": quantization,
    }

    class MergedModule(NALoRALightningModule):
        """With ordinary weights under its LoRA."""

        def configure_model(self) -> None:
            self.load_base = lambda source, device: dequantized(load_base_model(source, device), source.name_or_path)
            super().configure_model()

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=TIED)
            module = MergedModule.load_from_checkpoint(path, map_location="cpu", **options)
    except ConfigurationError:
        raise
    except Exception as error:
        raise _no_checkpoint(path, error) from error
    return module.peft_model, module.source


def _no_checkpoint(path: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the file {str(path)!r} is not a checkpoint of this package ({one_line(error)}); give an adapter folder or a "
        ".ckpt file of 'na-lora fit'."
    )


def options_parser() -> CommandParser:
    """The parser of its options."""
    parser = CommandParser(prog="na-lora merge", description="Merges an adapter into its base model.")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter or run, or .ckpt file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of the base model (default: the one the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the merged weights (default: auto, that of the base checkpoint)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of a non-empty output folder")
    parser.add_argument(
        "--quantization", choices=get_args(Kind), help="merge into what the base was in the fit, as ordinary weights"
    )
    parser.add_argument(
        "--no_double_quantization", dest="double_quantization", action="store_false", help="of the scales, in the fit"
    )
    parser.add_argument("--dequantize", action="store_true", help="of a base that is stored quantised")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--push_to", metavar="NAME", help="repository on the hub that is given the model as well")
    parser.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the base model run code of its own")
    return parser


def main(arguments: list[str]) -> int:
    """Runs ``na-lora merge``.

    Args:
        arguments: The command line after ``merge``.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: The user has something to correct.
    """
    folder = merge_adapter(MergeOptions(**vars(options_parser().parse_args(arguments))))
    print(f"Merged model {folder}")
    return 0
