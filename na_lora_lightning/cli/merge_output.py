"""Where a merged model is written: never over what it is made from, whole or not at all, with its tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError

from na_lora_lightning.checkpoints.adapter_folder import copy_reader
from na_lora_lightning.checkpoints.run_folders import is_within
from na_lora_lightning.data.text.tokenizer import add_tokens, has_tokenizer
from na_lora_lightning.errors import CheckpointError, ConfigurationError, one_line
from na_lora_lightning.models.source import BaseModelSource

_CONFIG = "config.json"
# What an earlier model left and this one may not replace, as it has other files.
_FORMER_FILES = ("model*.safetensors*", "pytorch_model*.bin*")
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def refuse_inputs_as_output(output: Path, adapter: Path, base: str | None) -> None:
    """Keeps a merge from writing over, into or around what it reads."""
    for what, place in (("adapter", adapter), ("base model", None if base is None else Path(base))):
        if place is None or not place.expanduser().exists():
            continue
        if is_within(output, place) or is_within(place, output):
            raise ConfigurationError(
                f"the output {str(output)!r} is the place of the {what} {str(place)!r}, or one of the two is inside "
                "the other, and the merge would write over what it reads; give another folder."
            )


def require_output(output: Path, *, overwrite: bool) -> None:
    """Checks that a model can be written to a folder, before there is one to be written.

    Args:
        output: The folder.
        overwrite: Whether it may have files already.

    Raises:
        ConfigurationError: It cannot.
    """
    place = output.expanduser()
    if place.exists() and not place.is_dir():
        raise ConfigurationError(f"the output {str(output)!r} is a file; give a folder.")
    if (place / "adapter_config.json").exists():
        # transformers would add it to the merged model.
        raise ConfigurationError(f"the output folder {str(output)!r} holds an adapter; give another.")
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise ConfigurationError(
            f"the output folder {str(output)!r} is not empty; give another, or --overwrite to replace files in it."
        )
    existing = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"the output {str(output)!r} cannot be written, as {str(existing)!r} is a file or not writable; give "
            "another folder."
        )


def require_shard_size(size: str) -> None:
    """Checks a size such as ``5GB``.

    Raises:
        ConfigurationError: It is none.
    """
    if not re.fullmatch(r"[1-9]\d*[KMG]I?B", size.upper()):
        raise ConfigurationError(f"--max_shard_size is {size!r}, and it is a size of files; write it as 5GB or 500MB.")


def require_repository_name(name: str) -> None:
    """Checks the name of a repository on the hub.

    Raises:
        ConfigurationError: It cannot be one.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigurationError(f"--push_to is {name!r}, which is no name on the hub; write it as user/model.") from (
            error
        )


def push(folder: Path, name: str, *, private: bool) -> None:
    """Gives a repository on the hub the files of a folder.

    Args:
        folder: That of a model.
        name: The repository, which is made if there is none.
        private: Whether it is then private.

    Raises:
        CheckpointError: The hub does not take them.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Merged by na-lora")
    except Exception as error:
        # The HTTP library behind the hub client, and so the class of its errors, changes between versions.
        raise CheckpointError(
            f"the merged model is in {str(folder)!r} and could not be pushed to {name!r} ({one_line(error)}); log in "
            f"with 'hf auth login', and push it with 'hf upload {name} {folder}'."
        ) from error


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write a model to, which takes the place of ``output``'s files when it is complete."""
    output = output.expanduser().resolve()
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if not output.exists():
            # One step, so that there is no folder with half of its files.
            partial.rename(output)
            return
        # Without its configuration it is not a model until all is there.
        (output / _CONFIG).unlink(missing_ok=True)
        for pattern in _FORMER_FILES:
            for file in output.glob(pattern):
                file.unlink()
        for file in sorted(partial.iterdir(), key=lambda file: file.name == _CONFIG):
            if file.is_dir():
                shutil.rmtree(output / file.name, ignore_errors=True)
            shutil.move(file, output / file.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the merged model could not be written to {str(output)!r} ({error}); make room there, or give another "
            "folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_tokenizer(source: BaseModelSource, output: Path, adapter: Path) -> None:
    """Copies the adapter's tokenizer and chat template, or else the base's with new tokens, and for images a processor.

    Warns where there is no tokenizer.
    """
    from transformers import AutoTokenizer

    if has_tokenizer(adapter):
        _copy_processor(source, output)
        copy_reader(adapter, output)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.resolved_name_or_path,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        rank_zero_warn(
            f"the base model {source.name_or_path!r} has no tokenizer that can be loaded ({one_line(error)}), so the "
            "merged model is without one."
        )
        return
    add_tokens(tokenizer, source.new_tokens)
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
