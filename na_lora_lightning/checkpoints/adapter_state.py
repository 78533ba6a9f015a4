"""What a checkpoint keeps of an adapted model, checks on loading it, and the adapter as a PEFT folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.checkpoints.adapter_folder import complete_folder, exchange, is_ours
from na_lora_lightning.checkpoints.run_record import RunRecord
from na_lora_lightning.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from peft import PeftModel

# Where a checkpoint says what its adapter fits.
CHECKPOINT_KEY = "na_lora_lightning"


# Options that leave the meaning of the saved weights alone, and may differ between saving and loading.
_FREE_OPTIONS = frozenset({"dropout", "init_lora_weights", "layers"})


def adapter_keys(module: nn.Module, prefix: str = "model.") -> set[str]:
    """Names of everything below ``prefix`` that is not the frozen base model.

    Args:
        module: The module whose ``state_dict`` names are meant.
        prefix: Where in it the PEFT model is.

    Returns:
        Trainable parameters, and whatever PEFT put in, trainable or not.
    """
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {
        name
        for name in module.state_dict()
        if name.startswith(prefix) and (name in trainable or ".lora_" in name or ".modules_to_save." in name)
    }


def without_base_weights(
    state: Mapping[str, Tensor], keys: Collection[str], prefix: str = "model."
) -> dict[str, Tensor]:
    """Leaves the frozen base model out of a state dict.

    Args:
        state: Of the whole LightningModule.
        keys: Those of the adapter, from :func:`adapter_keys`.
        prefix: Where the PEFT model is; what is outside it is kept.

    Returns:
        The rest, without copying tensors.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix) or name in keys}


def describe_adapter(model: PeftModel, lora: LoRAOptions, own_base: BaseQuantization | None = None) -> dict[str, Any]:
    """Plain values that say which base model and options an adapter belongs to."""
    base = model.get_base_model()
    return {
        "base_model_type": str(getattr(base.config, "model_type", type(base).__name__)),
        "base_model": str(model.peft_config["default"].base_model_name_or_path),
        "lora": asdict(lora),
        "base_quantization": None if own_base is None else asdict(own_base),
    }


def own_base_of_checkpoint(description: Mapping[str, Any]) -> BaseQuantization | None:
    """The base to which alone an adapter belongs of which :func:`describe_adapter` says so; None for all others."""
    found = description.get("base_quantization")
    return None if found is None else BaseQuantization(**found)


def require_same_adapter(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks that a checkpoint's adapter means the same in the current model.

    Args:
        saved: :func:`describe_adapter` of the checkpoint.
        current: That of the current model.

    Raises:
        ConfigurationError: They differ in more than what has no effect on the saved weights; names the first
            difference.
    """
    saved_type, current_type = saved["base_model_type"], current["base_model_type"]
    if saved_type != current_type:
        raise ConfigurationError(
            f"the checkpoint belongs to a model of type {saved_type!r} and the current one is {current_type!r}; load "
            "it with the model that it was trained on."
        )
    defaults = asdict(LoRAOptions())
    differences = [
        (option, saved["lora"].get(option, default), current["lora"].get(option, default))
        for option, default in defaults.items()
        if option not in _FREE_OPTIONS
    ]
    # It matters only if the saved weights are for a base that it has changed, or that it was made for.
    differences.append(("init_lora_weights", _of_own_base(saved["lora"]), _of_own_base(current["lora"])))
    for option, then, now in differences:
        if then != now:
            raise ConfigurationError(
                f"the checkpoint was trained with lora.{option}={then!r} and the current model has {now!r}; set "
                "lora as it was."
            )
    then_on, now_on = own_base_of_checkpoint(saved), own_base_of_checkpoint(current)
    if then_on is not None and now_on is not None:
        then_on.require("the checkpoint", now_on.kind, now_on.double, then_on.settings)


def _of_own_base(lora: Mapping[str, Any]) -> bool | str:
    arguments = LoRAOptions(init_lora_weights=lora.get("init_lora_weights", True))
    belongs = arguments.changes_base_weights or arguments.init_lora_weights == "loftq"
    return arguments.init_lora_weights if belongs else True


def require_same_tensors(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], keys: Collection[str]) -> None:
    """Checks that a checkpoint has exactly the adapter's tensors, in their shapes.

    Args:
        saved: The checkpoint's state dict.
        current: The state dict of the whole module.
        keys: Names of the adapter's tensors in ``current``.

    Raises:
        ConfigurationError: A tensor is missing, unknown or of another shape; names the first.
    """
    missing = sorted(set(keys) - set(saved))
    if missing:
        raise ConfigurationError(
            f"the checkpoint lacks {len(missing)} tensors of the adapter, such as {missing[0]!r}; load it with the "
            "model and lora options that it was trained with."
        )
    unknown = sorted(set(saved) - set(current))
    if unknown:
        raise ConfigurationError(
            f"the checkpoint has {len(unknown)} tensors that the model lacks, such as {unknown[0]!r}; load it with the "
            "model and lora options that it was trained with."
        )
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape:
            raise ConfigurationError(
                f"in the checkpoint {name!r} is {list(tensor.shape)} and in the model {list(current[name].shape)}; "
                "load it with the model and lora options that it was trained with."
            )


def write_adapter_folder(
    model: PeftModel,
    folder: str | Path,
    state: Mapping[str, Tensor] | None = None,
    prefix: str = "model.",
    reader: Any = None,
    card: str | None = None,
    run: str | None = None,
    own_base: BaseQuantization | None = None,
) -> Path:
    """Writes the adapter as ``peft`` itself does, for ``PeftModel.from_pretrained(base, folder)``.

    Beside the adapter it has the generation config of the model, and what is given. Its files are written beside it
    first and then take the place of the old ones at once, where the system can do that, so that a crash at any moment
    leaves the old adapter or the new one.

    Args:
        model: The PEFT model.
        folder: Where to; files of an earlier adapter are replaced.
        state: State dict of the LightningModule, where the model's own parameters are sharded; None reads them.
        prefix: Where in ``state`` the PEFT model is.
        reader: The tokenizer or processor of the model.
        card: The text of its model card.
        run: The run whose adapter it is, so that no other run replaces it.
        own_base: The base to which alone the adapter belongs; None stands for its base in any form.

    Returns:
        The folder.

    Raises:
        ConfigurationError: ``folder`` is something other than a folder for an adapter.
        CheckpointError: The disk is full, or writing fails otherwise.
    """
    folder = Path(folder)
    require_adapter_folder(folder)
    options: dict[str, Any] = {}
    if state is not None:
        options["state_dict"] = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
    # Where it really is: a link to a folder stays one.
    place = folder.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        # Left to itself PEFT asks the hub whether the vocabulary was resized, and it never is here.
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False, **options)
        complete_folder(model, partial, place, reader, card, own_base)
        if run is not None:
            RunRecord(run, "ended").write(partial)
        _take_place(partial, place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the adapter could not be written to {str(folder)!r} ({error}); make room, and resume from the last "
            "checkpoint (--ckpt_path last), which writes it again."
        ) from error
    return folder


def require_adapter_folder(folder: Path) -> None:
    """Checks that an adapter can be written to a folder.

    Raises:
        ConfigurationError: It is something other than a folder for an adapter.
    """
    if folder.exists() and (not folder.is_dir() or not _holds_adapter_or_nothing(folder)):
        raise ConfigurationError(
            f"{str(folder)!r} exists and is not an adapter folder, so it is not overwritten; set adapter.folder to "
            "another name."
        )


def _take_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        # One step, so that there is no folder with half of its files.
        partial.rename(folder)
        return
    kept = [file for file in folder.iterdir() if not (is_ours(file) or (partial / file.name).exists())]
    if all(file.is_file() for file in kept):
        for file in kept:
            # Somebody else's stays.
            shutil.copy2(file, partial / file.name)
        if exchange(partial, folder):
            shutil.rmtree(partial, ignore_errors=True)
            return
    former = [file for file in folder.iterdir() if is_ours(file) and not (partial / file.name).exists()]
    # The adapter comes last, as it is what the rest is about.
    for file in sorted(partial.iterdir(), key=lambda file: file.name.startswith("adapter_")):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    for file in former:
        # What is no longer so would be said of the new one.
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    partial.rmdir()


def _holds_adapter_or_nothing(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or not any(folder.iterdir())
