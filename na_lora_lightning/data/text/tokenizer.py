"""Loading the tokenizer of a language model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from na_lora_lightning.errors import ConfigurationError


def load_tokenizer(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, or explains in one sentence why it cannot be loaded."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and name_or_path.startswith(("/", "./", "../", "~")):
        raise ConfigurationError(f"the tokenizer folder {name_or_path!r} does not exist; correct the path.")
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name_or_path,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if folder.is_dir():
            reason = "the folder has no tokenizer that transformers can read"
        raise ConfigurationError(
            f"the tokenizer {name_or_path!r} cannot be loaded ({reason}); give the folder of a tokenizer or "
            "its name on the hub."
        ) from error
