"""Loading the processor of a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase
from transformers.utils import cached_file

from na_lora_lightning.errors import ConfigurationError


def load_processor(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Loads the processor of a vision-language model, with its tokenizer ready to pad and to render.

    Where its part for videos cannot be loaded, which needs torchvision, a processor is loaded without that part.

    Args:
        name_or_path: The folder or hub name of the model.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether a processor from the hub may run code of its own.

    Returns:
        A processor with ``tokenizer`` and ``image_processor``.

    Raises:
        ConfigurationError: There is none, or the model takes no images.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and name_or_path.startswith(("/", "./", "../", "~")):
        raise ConfigurationError(f"the processor folder {name_or_path!r} does not exist; correct the path.")
    name = str(folder) if folder.is_dir() else name_or_path
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        processor = _load(name, options)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigurationError(
            f"the processor of {name_or_path!r} cannot be loaded ({reason.rstrip('.')}); give the folder or hub name "
            "of a vision-language model."
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(processor, "image_processor"):
        raise ConfigurationError(
            f"the model {name_or_path!r} has no processor for images; give a vision-language model, or use "
            "InstructionDataModule for text."
        )
    # Checkpoints keep the template in either place or in both.
    processor.chat_template = tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def image_token_of(processor: Any) -> str:
    """The text that stands for an image in what a processor is given.

    Raises:
        ConfigurationError: The processor has none.
    """
    for owner in (processor, processor.tokenizer):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise ConfigurationError(
        f"{type(processor).__name__} has no image token, so that images cannot be put among words; use another model."
    )


def _load(name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, AttributeError):
        kind = _processor_class(name, options)
        if kind is None or "video_processor" not in kind.get_attributes():
            raise
        processor = without_videos(kind).from_pretrained(name, **options)
        processor.video_settings = _video_settings(name, options)
        return processor


def _processor_class(name: str, options: dict[str, Any]) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, **options))]
    except (OSError, ValueError, KeyError):
        return None


def _video_settings(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the part for videos, which are kept for where it can be used."""
    for file, key in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
        path = cached_file(
            name,
            file,
            revision=options["revision"],
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        values = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        settings: dict[str, Any] | None = values if key is None else values.get(key)
        if settings:
            return settings
    return None


class _NoVideos:
    """Has no setting."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def without_videos(kind: Any) -> Any:
    """A processor class that does without the part for videos."""

    class WithoutVideos(kind):
        # Some ask it how many frames a video has, though there is none.
        video_processor = _NoVideos()
        video_settings: dict[str, Any] | None = None

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **keywords: Any) -> Any:
            return super().from_args_and_dict(args, {**processor_dict, "video_processor": None}, **keywords)

        def save_pretrained(self, save_directory: Any, **keywords: Any) -> Any:
            saved = super().save_pretrained(save_directory, **keywords)
            path = Path(save_directory) / "processor_config.json"
            if self.video_settings and path.is_file():
                settings = {**json.loads(path.read_text(encoding="utf-8")), "video_processor": self.video_settings}
                settings.pop("video_settings", None)
                path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            return saved

        def __reduce__(self) -> Any:
            return _rebuild_without_videos, (kind, self.__dict__)

    WithoutVideos.__name__ = kind.__name__
    return WithoutVideos


def _rebuild_without_videos(kind: Any, state: dict[str, Any]) -> Any:
    """Unpickles a processor of a class that has no name."""
    new = without_videos(kind)
    processor = new.__new__(new)
    processor.__dict__.update(state)
    return processor
