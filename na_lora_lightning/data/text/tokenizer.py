"""Loading the tokenizer of a language model, and giving it the chat template that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from na_lora_lightning.errors import ConfigurationError, one_line

# The name under which TRL is asked for a template.
TRAINING = "training"


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


def choose_chat_template(reader: Any, name: str) -> str | None:
    """Gives a tokenizer or a processor the chat template that an option names.

    Args:
        reader: The tokenizer or processor.
        name: The file of a template; the name of one that the tokenizer has; the folder or hub name of a tokenizer
            that has one; or ``training``, for TRL's version of its own template in which answers are marked.

    Returns:
        A template to train with, where that is not the one to generate with; None where it is.

    Raises:
        ConfigurationError: There is none of that name.
    """
    path, own = Path(name).expanduser(), reader.chat_template
    if path.is_file():
        try:
            reader.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"the chat template {name!r} is not in UTF-8; save it as UTF-8.") from error
        return None
    if path.suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        raise ConfigurationError(f"the chat template {name!r} does not exist; correct the path.")
    if isinstance(own, dict) and name in own:
        reader.chat_template = own[name]
        return None
    if name == TRAINING:
        return _training_template(reader)
    reader.chat_template = load_tokenizer(name, revision=None, trust_remote_code=False).chat_template
    if reader.chat_template is None:
        raise ConfigurationError(f"the tokenizer {name!r} has no chat template; name one that has, or give a file.")
    return None


def _training_template(reader: Any) -> str | None:
    marks = "mark the answers of the template with {% generation %} and give its file"
    if reader.chat_template is None:
        raise ConfigurationError(
            f"chat_template={TRAINING!r} needs a template to begin with; name one, or give a file."
        )
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise ConfigurationError(
            f"chat_template={TRAINING!r} needs TRL ({one_line(error)}); install trl, or {marks}."
        ) from error
    try:
        template: str | None = get_training_chat_template(reader)
    except ValueError as error:
        raise ConfigurationError(f"TRL has no training version of the model's chat template; {marks}.") from error
    return template
