"""Tiny vision-language models with real processors on disk, pictures, and records; nothing comes from a hub.

Each kind puts images among words in another way: LLaVA repeats its image token and crops to one size, Idefics3 cuts an
image into tiles and pads them, the Qwen models flatten patches of images of any shape, and Gemma 3 attends to images in
both directions and surrounds them with line breaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from module_helpers import byte_tokenizer, write_jsonl
from PIL import Image
from tiny_models import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Qwen2VLImageProcessorPil,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    GenerationConfig,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
)

from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.processors import without_videos

KINDS = ("llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "gemma3")
IMAGE_SIZE = 32
PATCH_SIZE = 8
LINE_BREAKS = [("Ċ", "Ċ")]

_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATES = {
    # Nothing marks the end of a turn, as with LLaVA 1.5.
    "llava": (
        "{% for message in messages %}{{ message['role'] | upper }}: " + _PARTS + " {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ).replace("IMAGE", "<image>\n"),
    "idefics3": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
        + _PARTS
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ).replace("IMAGE", "<image>"),
    "qwen2_vl": _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2_5_vl": _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    # The token of the beginning is in the template, and the end of a turn is not the end of the sequence.
    "gemma3": (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        + _PARTS
        + "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ).replace("IMAGE", "<start_of_image>"),
}
# What ends an answer, and what stands for an image in the input of the language model.
END_OF_ANSWER = {
    "llava": " </s>",
    "idefics3": "<end_of_utterance>",
    "qwen2_vl": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "gemma3": "<end_of_turn>",
}
IMAGE_TOKEN = {
    "llava": "<image>",
    "idefics3": "<image>",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|image_pad|>",
    "gemma3": "<image_soft_token>",
}


def tiny_vlm_tokenizer(kind: str, **options: Any) -> PreTrainedTokenizerFast:
    """Bytes as tokens, two line breaks as one, and the special tokens of a kind of model."""
    special: dict[str, Any] = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]}
    if kind == "llava":
        special |= {"eos_token": "</s>", "bos_token": "<s>", "additional_special_tokens": ["<image>"]}
    elif kind == "idefics3":
        tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        around = ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>"]
        special |= {"eos_token": "<end_of_utterance>", "additional_special_tokens": [*around, *tiles]}
    elif kind == "gemma3":
        names = {"image": "image_soft_token", "boi": "start_of_image", "eoi": "end_of_image"}
        names |= {"start": "start_of_turn", "end": "end_of_turn"}
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "additional_special_tokens": None}
        special["extra_special_tokens"] = {f"{name}_token": f"<{token}>" for name, token in names.items()}
    else:
        around = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>"]
        special |= {"eos_token": "<|im_end|>", "additional_special_tokens": around}
    return byte_tokenizer(chat_template=None, **{"merges": LINE_BREAKS, **special, **options})


def tiny_vlm_processor(kind: str, chat_template: str | None = "", **tokenizer_options: Any) -> Any:
    """A processor of a kind of model; its images are 32 pixels wide and its patches 8."""
    tokenizer = tiny_vlm_tokenizer(kind, **tokenizer_options)
    template = CHAT_TEMPLATES[kind] if chat_template == "" else chat_template
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "idefics3":
        edges = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
        return Idefics3Processor(Idefics3ImageProcessorPil(**edges), tokenizer, image_seq_len=4, chat_template=template)
    if kind == "gemma3":
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=side), tokenizer, image_seq_length=4, chat_template=template
        )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        patch_size=PATCH_SIZE,
        merge_size=2,
        temporal_patch_size=2,
    )
    # Its part for videos needs torchvision.
    kind_of_processor = without_videos(Qwen2VLProcessor if kind == "qwen2_vl" else Qwen2_5_VLProcessor)
    return kind_of_processor(images, tokenizer, chat_template=template)


def tiny_vlm_model(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A model of two layers of each sort, with random weights."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    image = {"image_token_id": token(IMAGE_TOKEN[kind])}
    if kind == "llava":
        options: dict[str, Any] = {
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **tower},
            "vision_feature_layer": -1,
            **image,
        }
    elif kind == "idefics3":
        tower["hidden_act"] = "gelu_pytorch_tanh"
        options = {"text_config": {"model_type": "llama", **text}, "vision_config": tower, "scale_factor": 2, **image}
    elif kind == "gemma3":
        gemma = {"head_dim": 8, "sliding_window": 512, "query_pre_attn_scalar": 8, **text}
        tower["hidden_act"] = "gelu_pytorch_tanh"
        ends = {"boi_token_index": token("<start_of_image>"), "eoi_token_index": token("<end_of_image>")}
        options = {"text_config": gemma, "vision_config": tower, "mm_tokens_per_image": 4, **ends}
        options["image_token_index"] = token(IMAGE_TOKEN[kind])
    else:
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        ends = {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
        options = {"text_config": text, **image, **ends, "video_token_id": token("<|video_pad|>")}
        options["vision_config"] = {"depth": 2, "num_heads": 2, "patch_size": PATCH_SIZE, "spatial_merge_size": 2}
        if kind == "qwen2_vl":
            options["vision_config"] |= {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16}
            options["vision_config"] |= {"window_size": 32, "fullatt_block_indexes": [1], **sizes}
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **options))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            # Gemma's projection begins at nothing, through which nothing could be seen of an image.
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def tiny_vlm(kind: str, folder: Path, seed: int = 0, **processor_options: Any) -> Path:
    """Writes a model with its processor, and returns the folder."""
    processor = tiny_vlm_processor(kind, **processor_options)
    tiny_vlm_model(kind, processor.tokenizer, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind.startswith("qwen"):
        # As on the hub, also where its part for videos cannot be made.
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["video_processor"] = {**settings["image_processor"], "video_processor_type": "Qwen2VLVideoProcessor"}
        del settings["video_processor"]["image_processor_type"]
        path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_pictures(folder: Path, count: int) -> list[str]:
    """Writes pictures of different shapes, and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        picture(number, 24 + 5 * number % 24, 24 + 7 * number % 24).save(folder / name)
    return names


def numbered_vision_records(count: int) -> list[dict[str, str]]:
    """Records of one picture each and of different lengths, whose completions say which they are."""
    return [
        {"image": f"pictures/{number}.png", "prompt": "x" * (1 + 5 * number % 7), "completion": str(number)}
        for number in range(count)
    ]


def write_vision_records(folder: Path, count: int) -> str:
    """Writes numbered records with their pictures, and returns their file."""
    write_pictures(folder / "pictures", count)
    return write_jsonl(folder / "data.jsonl", numbered_vision_records(count))


def write_vision_sources(folder: Path, count: int) -> dict[str, dict[str, str]]:
    """The same records as a file, as Parquet, saved with images of their own, and as a folder of images.

    Returns:
        The columns to name of each source.
    """
    source = write_vision_records(folder / "files", count)
    rows = numbered_vision_records(count)
    texts = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    paths = [str(folder / "files" / row["image"]) for row in rows]
    text_features = {"prompt": Value("string"), "completion": Value("string")}
    one = Dataset.from_dict({"image": paths, **texts}, features=Features({"image": datasets.Image(), **text_features}))
    one.to_parquet(str(folder / "one.parquet"))
    features = Features({"pictures": List(datasets.Image()), **text_features})
    several = Dataset.from_dict({"pictures": [[path] for path in paths], **texts}, features=features)
    # Saving to disk puts the files into the data.
    several.save_to_disk(str(folder / "several"))
    images = folder / "folder" / "train"
    write_pictures(images, count)
    metadata = [{"file_name": f"{number}.png", **row} for number, row in enumerate(rows)]
    write_jsonl(images / "metadata.jsonl", [{k: v for k, v in row.items() if k != "image"} for row in metadata])
    plain: dict[str, dict[str, str]] = {source: {}, str(folder / "one.parquet"): {}, str(folder / "folder"): {}}
    return {**plain, str(folder / "several"): {"images": "pictures"}}


@pytest.fixture(scope="module", name="vlm")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model of a kind."""
    return cache(lambda kind: str(tiny_vlm(kind, tmp_path_factory.mktemp(kind))))


def target_texts(datamodule: VisionInstructionDataModule, batch: dict[str, Any]) -> list[str]:
    """The texts that the loss of a batch is on; checks that they are where they stand."""
    pairs = list(zip(batch["input_ids"], batch["labels"], strict=True))
    assert all(torch.equal(ids[labels != -100], labels[labels != -100]) for ids, labels in pairs)
    return [str(datamodule.tokenizer.decode(labels[labels != -100])) for _, labels in pairs]
