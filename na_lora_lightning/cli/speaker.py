"""A model that answers, with its adapter or without: whom ``na-lora chat`` talks with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from na_lora_lightning.checkpoints.adapter_folder import end_token_ids
from na_lora_lightning.checkpoints.model_card import weights_of
from na_lora_lightning.cli.adapters import base_of_adapter
from na_lora_lightning.data.answers import as_list, stop_at
from na_lora_lightning.data.images.encoding import VisionRecordEncoder
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.tokenizer import has_tokenizer, load_tokenizer
from na_lora_lightning.errors import ConfigurationError, DataError
from na_lora_lightning.models.limits import ModelLimits
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.quantization import QuantizationOptions
from na_lora_lightning.models.saved_adapter import (
    adapter_folder,
    read_adapter_config,
    require_own_base,
    with_adapter,
)
from na_lora_lightning.models.source import BaseModelSource, Dtype

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

# Of what a model writes, characters that would command a terminal.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_ENDLESS = 1 << 30


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.
        top_p: Drawn from the likeliest tokens that together have this probability, in (0, 1].

    Raises:
        ConfigurationError: A value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"--max_new_tokens is {self.max_new_tokens}; set it to at least 1.")
        if self.temperature < 0:
            raise ConfigurationError(f"--temperature is {self.temperature}; set it to 0, which draws nothing, or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"--top_p is {self.top_p}, and it is a probability; set it in (0, 1].")


class Speaker:
    """A model that answers, from a folder.

    Args:
        place: Folder of a model, an adapter or a run, or a model's name on the hub.
        base: The base model in the place of the one that the adapter names.
        dtype: Of the weights.
        device: Where it runs.
        trust_remote_code: Whether a model from the hub may run code of its own.
        quantization: In what form the base weights are held.

    Attributes:
        title: What it is, in one line.
        adapter: The folder of its adapter, if it has one.
        takes_images: Whether it does.

    Raises:
        ConfigurationError: There is no such model, or none that writes.
    """

    def __init__(
        self,
        place: str,
        base: str | None,
        dtype: Dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        quantization: QuantizationOptions = QuantizationOptions(),
    ) -> None:
        self.adapter = _adapter_of(place)
        revision = None
        if self.adapter is None and base is not None:
            raise ConfigurationError(f"--base is given, and {place!r} is no adapter; leave it out.")
        if self.adapter is not None:
            require_own_base(self.adapter, quantization, on_command_line=True)
        name = place if self.adapter is None else base
        if name is None:
            assert self.adapter is not None
            name, revision = base_of_adapter(self.adapter)
        source = BaseModelSource(name, revision, trust_remote_code, dtype, quantization=quantization)
        model = load_base_model(source, device)
        if getattr(model, "generation_config", None) is None:
            raise ConfigurationError(f"the model {name!r} does not write; give a causal language model.")
        self.title = name
        self._encoder = _encoder(model, source, self.adapter)
        self.takes_images = isinstance(self._encoder, VisionRecordEncoder)
        if self.adapter is not None:
            stop_at(model.generation_config, end_token_ids(self.adapter))
            model = with_adapter(model, self.adapter, name)  # type: ignore[assignment]
            self.title = f"{self.adapter}{weights_of(self.adapter)} on {name}"
        if quantization.kind is None:
            # Quantised weights are there already.
            model = model.to(device)  # type: ignore[arg-type]
        self.model: Any = model.eval()
        self.limits = ModelLimits(self._base)
        self._own: Any = self._base.generation_config
        self.ends = [*as_list(self._own.eos_token_id)]
        self.ends += [] if self.tokenizer.eos_token_id in self.ends else [self.tokenizer.eos_token_id]

    @property
    def _base(self) -> Any:
        return self.model if self.adapter is None else self.model.get_base_model()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._encoder.tokenizer

    @property
    def has_template(self) -> bool:
        """Whether it knows turns; if not, texts are continued."""
        return self._encoder.use_chat_template

    def require_base(self) -> None:
        """Checks that it can also answer without its adapter.

        Raises:
            ConfigurationError: It has none, or the base model is another than before.
        """
        if self.adapter is None:
            raise ConfigurationError("--compare is for adapters, and this is a model without one; leave it out.")
        kind = read_adapter_config(self.adapter).get("init_lora_weights")
        if str(kind).startswith(("pissa", "olora", "loftq", "corda")):
            raise ConfigurationError(
                f"the adapter began with init_lora_weights={kind!r}, which takes weights out of the base model, so "
                "that without the adapter it is another model; leave --compare out and chat with the base by itself."
            )

    def inputs_of(self, messages: list[dict[str, Any]], images: list[Image]) -> dict[str, Any]:
        """What the model is given for the next answer, as ``na-lora predict`` does.

        Args:
            messages: With ``role`` and ``content``, the last of them the user's.
            images: Those of all messages, in order.

        Raises:
            DataError: The chat template refuses them.
        """
        encoder = self._encoder
        if not self.has_template:
            text = str(messages[-1]["content"])
            ids = [*encoder.leading_ids, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        elif isinstance(encoder, VisionRecordEncoder):
            text = encoder.beginning + encoder.template.render(messages, is_prompt=True)
            return dict(
                encoder.processor(
                    text=[text],
                    images=[images] if images else None,
                    text_kwargs={"add_special_tokens": encoder.add_special_tokens},
                    return_tensors="pt",
                )
            )
        else:
            text = encoder.template.render(messages, is_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError("is empty")
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}

    def answer(
        self,
        inputs: dict[str, Any],
        settings: AnswerSettings,
        write: Callable[[str], None],
        with_adapter: bool = True,
    ) -> str:
        """Answers, and writes the text while it comes.

        Args:
            inputs: From :meth:`inputs_of`.
            settings: How it is drawn.
            write: Is given each piece of text, without characters that command terminals.
            with_adapter: Whether the adapter has a part in it.

        Returns:
            The whole text; what there was of it where the user interrupted.

        Raises:
            DataError: It is too long for the model.
        """
        self.limits.require_batch({"prompt_input_ids": inputs["input_ids"]}, settings.max_new_tokens)
        streamer = _Pieces(self.tokenizer, self.ends, write)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        without = self.model.disable_adapter() if self.adapter is not None and not with_adapter else nullcontext()
        with torch.inference_mode(), self._settings(settings), without:
            try:
                self.model.generate(**inputs, streamer=streamer)
            except KeyboardInterrupt:
                streamer.end()
        return streamer.text

    @contextmanager
    def _settings(self, settings: AnswerSettings) -> Iterator[None]:
        # The model's own would be merged into whatever is passed to generate.
        drawing = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        pad = self.tokenizer.pad_token_id
        self._base.generation_config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            **(drawing if settings.temperature > 0 else {"do_sample": False}),
            use_cache=True,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            eos_token_id=self.ends,
            bos_token_id=getattr(self._own, "bos_token_id", None),
        )
        try:
            yield
        finally:
            self._base.generation_config = self._own


def _adapter_of(place: str) -> Path | None:
    """The adapter folder that a place is, or has; None for a model."""
    folder = Path(place).expanduser()
    if not folder.exists() or (folder / "config.json").is_file():
        return None
    return adapter_folder(folder)


def _encoder(model: PreTrainedModel, source: BaseModelSource, adapter: Path | None) -> Any:
    """Makes tokens of texts, with the tokenizer or processor of the adapter where it has one."""
    from na_lora_lightning.core.model_parts import is_multimodal

    of_adapter = adapter is not None and has_tokenizer(adapter)
    name = str(adapter) if of_adapter else source.resolved_name_or_path
    options: dict[str, Any] = {
        "revision": None if of_adapter else source.revision,
        "trust_remote_code": source.trust_remote_code,
    }
    rendering: dict[str, Any] = {"max_length": _ENDLESS, "use_chat_template": None, "system_prompt": None}
    if is_multimodal(model):
        return VisionRecordEncoder(load_processor(name, **options), **rendering)
    return RecordEncoder(load_tokenizer(name, **options), loss_on="completion", **rendering)


class _Pieces(TextStreamer):
    """Hands on what a model writes, word by word, without its prompt and what ends it."""

    def __init__(self, tokenizer: Any, ends: Collection[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._write, self.text = ends, write, ""

    def put(self, value: torch.Tensor) -> None:
        # Not every token that ends an answer is a special one.
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.translate(_CONTROLS)
        self.text += text
        if text:
            self._write(text)
