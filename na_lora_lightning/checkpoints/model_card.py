"""The model card of an adapter: what it was made from, how, how good it is, and how to use it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard, ModelCardData

from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.checkpoints.adapter_folder import hub_name, portable_base
from na_lora_lightning.checkpoints.measurements import Measurement, heading

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from peft import PeftModel

_PACKAGES = ("na-lora-lightning", "peft", "transformers", "torch", "lightning")
# The names of data and readers are shown elsewhere or not at all.
_NOT_SHOWN = re.compile(
    r"train|validation|test|predict|dataset_config|.*_name_or_path|.*_revision|num_workers|trust_.*"
)
_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "zero-shot-image-classification": "AutoModel",
}


def adapter_card(
    model: PeftModel,
    trainer: Trainer,
    settings: Mapping[str, Any],
    weights: str,
    measurements: Sequence[Measurement],
    folder: Path,
    own_base: BaseQuantization | None = None,
) -> str:
    """Writes the card of an adapter.

    Args:
        model: The PEFT model.
        trainer: Of the fit.
        settings: Options of the module, by name.
        weights: Which step they are of, in words.
        measurements: In the order in which they are shown.
        folder: The adapter's folder.
        own_base: The base to which alone the adapter belongs; None stands for its base in any form.

    Returns:
        Markdown with a YAML header, without absolute paths; text from data is shown as code.
    """
    base = str(model.peft_config["default"].base_model_name_or_path)
    task, config = _task(model), cast(Any, model.get_base_model()).config.get_text_config()
    data = ModelCardData(
        base_model=hub_name(base),
        library_name="peft",
        pipeline_tag=task,
        tags=["lora", "na-lora", "transformers", *([f"base_model:adapter:{hub_name(base)}"] if hub_name(base) else [])],
    )
    name = str(portable_base(base, None, folder)["base_model_name_or_path"])
    sections = [
        f"# LoRA adapter for {_code(name)}",
        f"A LoRA adapter in the format of PEFT for {_code(name)}"
        + ("" if hub_name(base) else ", a local folder where it was trained")
        + f". It was trained with NA-LoRA for PyTorch Lightning; its weights are those of {weights}.",
        *_usage(name, folder.name, task, own_base, config.vocab_size if settings.get("new_tokens") else None),
        *_data_section(getattr(trainer, "datamodule", None)),
        *_metrics_section(measurements),
        "## Training",
        _fenced(json.dumps(_settings(trainer, settings), indent=2, ensure_ascii=False), "json"),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def weights_of(folder: Path) -> str:
    """Which step the weights of an adapter folder are of, in brackets; nothing where its card does not say."""
    with suppress(OSError, ValueError):
        card = (folder / "README.md").read_text(encoding="utf-8")
        if match := re.search(r"its weights are those of (step [^.\n]*)\.", card):
            return f" ({match[1]})"
    return ""


def _task(model: PeftModel) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    base: Any = model.get_base_model()
    if getattr(base, "generation_config", None) is None:
        return "zero-shot-image-classification"
    with_images = base.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return "image-text-to-text" if with_images and hasattr(base.config, "vision_config") else "text-generation"


def _usage(base: str, folder: str, task: str, own_base: BaseQuantization | None, rows: int | None) -> Iterator[str]:
    kind, reader = _CLASSES[task], "AutoTokenizer" if task == "text-generation" else "AutoProcessor"
    generates = task != "zero-shot-image-classification"
    name, merge = json.dumps(base), f"na-lora merge --adapter {json.dumps(folder)} --output merged"
    settings: list[str] = []
    if own_base is not None:
        options = f"load_in_4bit=True, bnb_4bit_quant_type={json.dumps(own_base.kind)}"
        settings = [f"four_bits = BitsAndBytesConfig({options}, bnb_4bit_use_double_quant={own_base.double})"]
        name, merge = f"{name}, quantization_config=four_bits", f"{merge} {own_base.arguments}"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}, {reader}"
        + (", BitsAndBytesConfig" if settings else "")
        + (", GenerationConfig" if generates else ""),
        "",
        *settings,
        f"adapter = {json.dumps(folder)}  # this folder",
        f"reader = {reader}.from_pretrained(adapter)",
        f"model = {kind}.from_pretrained({name})",
        *([f"model.resize_token_embeddings({rows})  # for the tokens that the adapter adds"] if rows else []),
        "model = PeftModel.from_pretrained(model, adapter)",
    ]
    if generates:
        lines.append("model.generation_config = GenerationConfig.from_pretrained(adapter)  # stops where answers end")
    yield "## Use"
    yield _fenced("\n".join(lines), "python")
    if own_base is not None:
        yield (
            f"It began with what {own_base.kind} lost of the base (LoftQ), so that it is for the base in those four "
            "bits alone; on any other, what was lost would count twice."
        )
    yield "A model of its own, without LoRA:"
    yield _fenced(merge, "console")


def _data_section(datamodule: Any) -> Iterator[str]:
    sources = getattr(datamodule, "sources", None)
    if not isinstance(sources, dict):
        return
    describe = getattr(datamodule, "describe", None)
    sizes = describe() if callable(describe) else {}
    rows = []
    for split, source in sources.items():
        if source is not None and split != "predict":
            size = sizes.get(split)
            counts = ("", "", "") if size is None else (size.records, size.tokens, size.target_tokens)
            rows.append([split, _code(_file_name(str(source))), *map(str, counts)])
    if rows:
        yield "## Data"
        yield _table(["split", "source", "records", "tokens", "target tokens"], rows)
    classes = getattr(datamodule, "class_names", None)
    if classes:
        yield f"Classes: {', '.join(_code(str(name)) for name in classes)}."


def _metrics_section(measurements: Sequence[Measurement]) -> Iterator[str]:
    measured = [measurement for measurement in measurements if measurement.metrics]
    if not measured:
        return
    names = list(dict.fromkeys(name for measurement in measured for name in measurement.metrics))
    yield "## Validation"
    yield _table(
        ["metric", *(heading(measurement.label, measurement.step) for measurement in measured)],
        [
            [name, *(f"{value:.4g}" if (value := entry.metrics.get(name)) is not None else "" for entry in measured)]
            for name in names
        ],
    )


def _settings(trainer: Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    mechanisms = {
        type(callback).__name__: callback.options
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if is_dataclass(getattr(callback, "options", None))
    }
    seed = os.environ.get("PL_GLOBAL_SEED")
    datamodule = getattr(trainer, "datamodule", None)
    shown = {name: value for name, value in settings.items() if not _NOT_SHOWN.fullmatch(name) and name != "adapter"}
    return _plain(
        {
            **shown,
            "mechanisms": mechanisms,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "seed": None if seed is None else int(seed),
            "data": {
                name: value
                for name, value in dict(getattr(datamodule, "hparams", {})).items()
                if hasattr(datamodule, "sources") and not _NOT_SHOWN.fullmatch(name)
            },
            "versions": dict(_versions()),
        }
    )


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        # This one may be used without being installed.
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _plain(value: Any) -> Any:
    """Values that JSON has, with the last name alone of whatever is an absolute path."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _file_name(str(value))


def _file_name(text: str) -> str:
    """The last name of a local path, with what follows its colon; anything else as it is."""
    is_path = text.startswith(("/", "~", ".")) or Path(text).exists() or re.match(r"[A-Za-z]:[\\/]", text)
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if is_path and "\n" not in text else text


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A text as it is, whatever markup is in it."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
