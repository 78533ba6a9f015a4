"""What an adapter folder has besides the adapter: what reads texts and images, where answers end, a base to find again.

Nothing in it is an absolute path, which would say more about a machine than its owner may want to, and be of no use
anywhere else.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_lora_lightning.base_quantization import FILE, BaseQuantization
from na_lora_lightning.data.answers import as_list

if TYPE_CHECKING:
    from peft import PeftModel

_CONFIG = "adapter_config.json"
_GENERATION_CONFIG = "generation_config.json"
_CARD = "README.md"
# Files of tokenizers and processors.
_READER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates",
    "*processor_config.json",
)


def complete_folder(
    model: PeftModel, partial: Path, folder: Path, reader: Any, card: str | None, own_base: BaseQuantization | None
) -> None:
    """Adds to what PEFT has written of an adapter.

    Args:
        model: The PEFT model.
        partial: Where PEFT has written to.
        folder: The adapter folder that this will be.
        reader: The tokenizer or processor of the model; None leaves it out.
        card: The text of the model card; None leaves it out.
        own_base: The base to which alone the adapter belongs; None stands for its base in any form.
    """
    path = partial / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(portable_base(str(config.get("base_model_name_or_path") or ""), config.get("revision"), folder))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation: Any = getattr(model.get_base_model(), "generation_config", None)
    if generation is not None:
        # Not save_pretrained, which refuses settings that some models are published with.
        generation.to_json_file(partial / _GENERATION_CONFIG)
    if own_base is not None:
        own_base.write(partial)
    if reader is not None:
        reader.save_pretrained(str(partial))
    # PEFT's own card names the base by its path.
    (partial / _CARD).unlink(missing_ok=True)
    if card is not None:
        (partial / _CARD).write_text(card, encoding="utf-8")


def is_ours(file: Path) -> bool:
    """Whether a file of an adapter folder is one that this package or PEFT writes."""
    names = (_CONFIG, _GENERATION_CONFIG, _CARD, FILE, "adapter_model.*", *_READER_FILES)
    return any(fnmatch(file.name, name) for name in names)


def exchange(first: Path, second: Path) -> bool:
    """Has two folders change places in one step, and tells whether the system can do that."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    # Paths from the working directory on; the flag is RENAME_EXCHANGE.
    return rename is not None and rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0


def hub_name(base: str) -> str | None:
    """The name that a base model has on the hub; None for a folder that is not the hub's cache."""
    path = Path(base)
    if not path.is_absolute():
        return None if base.startswith(".") or not base else base
    kind, _, name = path.parent.parent.name.partition("--")
    return name.replace("--", "/") if kind == "models" and path.parent.name == "snapshots" else None


def portable_base(base: str, revision: str | None, folder: Path) -> dict[str, str | None]:
    """How an adapter names its base model.

    Args:
        base: A hub name, or the absolute path of a folder.
        revision: Of the hub model.
        folder: The adapter's folder.

    Returns:
        ``base_model_name_or_path`` and ``revision`` for the adapter's configuration. A folder is named from the working
        directory on if it is below it, else from the adapter's folder on, if the two have more in common than the root
        of the file system, else by its last name; all three begin with a dot.
    """
    path, name = Path(base), hub_name(base)
    if name is not None and path.is_absolute():
        return {"base_model_name_or_path": name, "revision": revision or path.name}
    if not path.is_absolute():
        return {"base_model_name_or_path": base or None, "revision": revision}
    here, folder = Path.cwd().resolve(), folder.resolve()
    if path.is_relative_to(here):
        local = path.relative_to(here)
    elif path.parts[:2] == folder.parts[:2]:
        local = Path(os.path.relpath(path, folder))
    else:
        local = Path(path.name)
    text = local.as_posix()
    return {"base_model_name_or_path": text if text.startswith(".") else f"./{text}", "revision": revision}


def find_base(base: str, adapter: Path) -> str:
    """Finds the folder that :func:`portable_base` named.

    Args:
        base: The name in the adapter's configuration.
        adapter: The adapter's folder.

    Returns:
        The folder as it is found from the working directory, from the adapter's folder, or beside one of the folders
        that this one is in; else ``base``, as is a hub name.
    """
    if base.startswith("."):
        for start in (Path(), adapter, *adapter.resolve().parents):
            if (start / base / "config.json").is_file():
                return str((start / base).resolve())
    return base


def end_token_ids(adapter: Path) -> list[int]:
    """The tokens that the generation config of an adapter folder stops at; none if it has no such file."""
    path = adapter / _GENERATION_CONFIG
    if not path.is_file():
        return []
    return as_list(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))


def copy_reader(adapter: Path, output: Path) -> None:
    """Copies tokenizer and chat template of an adapter folder, and of a processor what the output lacks.

    Args:
        adapter: The adapter folder.
        output: The folder of a model, which has the processor of its base, if that has one: it may have parts that
            could not be loaded in training, such as one for videos.
    """
    for file in (file for pattern in _READER_FILES for file in adapter.glob(pattern)):
        target = output / file.name
        if file.is_dir():
            shutil.copytree(file, target, dirs_exist_ok=True)
        elif not (file.name.endswith("processor_config.json") and target.exists()):
            shutil.copyfile(file, target)
