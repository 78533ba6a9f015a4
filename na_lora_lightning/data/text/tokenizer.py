"""Loading the tokenizer of a language model, and giving it the chat template that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

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


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder, such as that of an adapter, has a tokenizer."""
    return (folder / "tokenizer_config.json").is_file()


def require_new_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """Returns a list of new tokens, if it is one.

    Raises:
        ConfigurationError: It is not, or has an empty text or a text twice.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise ConfigurationError(f"new_tokens is {tokens!r}, and it is a list of texts; write it as ['<think>'].")
    if "" in tokens:
        raise ConfigurationError("new_tokens has an empty text, which no text has in it; leave it out.")
    twice = next((token for token in tokens if list(tokens).count(token) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"new_tokens has {twice!r} twice; leave one of the two out.")
    return tuple(tokens)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Has a tokenizer read texts as one token each, wherever they stand.

    They are no special tokens, which would be missing in what is decoded.

    Args:
        tokenizer: Changed in place.
        tokens: The texts; those that the vocabulary has keep their ids.

    Returns:
        Their ids, in that order.

    Raises:
        ConfigurationError: The list is none, or the tokenizer does not take it.
    """
    tokens = require_new_tokens(tokens)
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    new = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in known]
    try:
        tokenizer.add_tokens(new)
        read = {token: tokenizer.encode(token, add_special_tokens=False) for token in tokens}
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the tokenizer {tokenizer.name_or_path!r} takes no new tokens ({one_line(error).rstrip('.')}); leave "
            "model.new_tokens out."
        ) from error
    split = next((token for token, ids in read.items() if len(ids) != 1), None)
    if split is not None:
        raise ConfigurationError(
            f"the tokenizer {tokenizer.name_or_path!r} reads {split!r} as {len(read[split])} tokens though it was "
            "added; leave it out of model.new_tokens."
        )
    return [ids[0] for ids in read.values()]


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
