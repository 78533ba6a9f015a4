"""The memory of training, as ``na-lora inspect`` estimates it and as it is measured.

Real fits of three steps with both mechanisms, of models with random weights (memory does not depend on their values),
in batches of records of unequal length of which half of the tokens are targets::

    python benchmarks/memory.py                    # about five minutes on two cores; 7 GB
    python benchmarks/memory.py --device cuda      # less than a minute

On a CPU the peak is the growth of the process's resident memory over that before the model is made, after a fit of a
tiny model has loaded whatever a fit loads; freed memory goes back to the system at once, as malloc is told to map every
block above 64 KiB. On a GPU it is ``torch.cuda.max_memory_allocated``, in bfloat16 with the adapter in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

MODELS = {
    "SmolLM2-135M": [(1, 512), (8, 128), (4, 512)],
    "Gemma 3 270M": [(1, 512), (8, 128), (4, 256)],
    "LLaVA on SmolLM2": [(1, 256), (4, 256), (2, 512)],
}
TINY = "tiny"
_IMAGE_TOKEN = 7


def configuration(name: str) -> Any:
    """The configuration of a model, in its published sizes."""
    from transformers import CLIPVisionConfig, Gemma3TextConfig, LlamaConfig, LlavaConfig

    if name == "Gemma 3 270M":
        return Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
            architectures=["Gemma3ForCausalLM"],
        )
    tiny = name == TINY
    text = LlamaConfig(
        vocab_size=1000 if tiny else 49_152,
        hidden_size=36 if tiny else 576,
        intermediate_size=64 if tiny else 1536,
        num_hidden_layers=2 if tiny else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    if not name.startswith("LLaVA"):
        return text
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE_TOKEN,
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
    )


def batch_of(config: Any, records: int, length: int) -> dict[str, Any]:
    """Records of lengths down to three quarters of the longest, one image each where the model takes images."""
    import torch

    lengths = torch.linspace(length, 3 * length // 4, records).long()
    ids = torch.randint(10, 900, (records, length), generator=torch.Generator().manual_seed(0))
    batch: dict[str, Any] = {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        ids[:, 1 : 1 + (vision.image_size // vision.patch_size) ** 2] = _IMAGE_TOKEN
        batch["pixel_values"] = torch.rand(records, 3, vision.image_size, vision.image_size)
    is_target = batch["attention_mask"].bool() & (torch.arange(length) >= length // 2)
    return {**batch, "input_ids": ids, "labels": torch.where(is_target, ids, -100)}


def rows(name: str, shapes: list[tuple[int, int]], device: str) -> list[dict[str, Any]]:
    """Measures and estimates fits of a model, which must be the first thing that the process does."""
    import torch

    kind = torch.device(device)
    if kind.type == "cpu":
        fit(TINY, (2, 16), kind)
    before = resident()
    measured = [fit(name, shape, kind) - (before if kind.type == "cpu" else 0) for shape in shapes]
    found = []
    for shape, peak in zip(shapes, measured, strict=True):
        began = time.perf_counter()
        estimate = estimated(name, shape, kind)
        found.append(
            {
                "model": name,
                "shape": f"{shape[0]} × {shape[1]}",
                "estimated": estimate.peak,
                "measured": peak,
                "seconds": time.perf_counter() - began,
                "parts": vars(estimate),
            }
        )
    return found


def estimated(name: str, shape: tuple[int, int], device: Any) -> Any:
    """What ``na-lora inspect`` would say."""
    import torch

    from na_lora_lightning import LoRAOptions
    from na_lora_lightning.models.source import BaseModelSource
    from na_lora_lightning.modules.memory import estimate_memory

    config = configuration(name)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return estimate_memory(
            BaseModelSource(folder), LoRAOptions(), batch_of(config, *shape), dtype=dtype, device=device.type
        )


def fit(name: str, shape: tuple[int, int], device: Any) -> int:
    """Trains for three steps.

    Returns:
        The most bytes that were held: of the process on a CPU, of tensors on a GPU.
    """
    import torch
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from na_lora_lightning import (
        AdapterOptions,
        GateImportanceCallback,
        LoRAOptions,
        NALoRALightningModule,
        StepScaleCallback,
    )
    from na_lora_lightning.models.lora import add_lora
    from na_lora_lightning.models.source import auto_class

    config = configuration(name)
    batch = batch_of(config, *shape)
    module = NALoRALightningModule(name, adapter=AdapterOptions(write="never"))
    with device:
        base = (
            auto_class(config)
            .from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
            .eval()
        )
    module.model = add_lora(base, LoRAOptions(), module.source)
    trainer = Trainer(
        max_steps=3,
        accelerator=device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GateImportanceCallback(warmup_steps=1, refresh_every=1), StepScaleCallback()],
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Highest() as highest:
        trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else highest.resident
    del module, trainer, base
    gc.collect()
    return peak


class Highest:
    """The most resident memory of the process, looked at every two milliseconds."""

    resident = 0

    def __enter__(self) -> Highest:
        """Starts looking."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stops looking."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.resident = max(self.resident, resident())


def resident() -> int:
    """Bytes that the process holds of its own, without files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--model", choices=tuple(MODELS), help="only this model, as JSON")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.model is not None:
        print(json.dumps(rows(options.model, MODELS[options.model], options.device)))
        return
    found = []
    for name, shapes in MODELS.items():
        if options.device == "cuda":
            found += rows(name, shapes, options.device)
            continue
        # A process of its own, whose memory nothing else has been in.
        command = [sys.executable, __file__, "--model", name, "--device", options.device]
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        printed = subprocess.run(
            command, env={**os.environ, **malloc}, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        found += json.loads(printed.splitlines()[-1])
    print("| model | batch × length | estimated, MiB | measured, MiB | ratio |\n|---|---|---:|---:|---:|")
    for row in found:
        estimate, peak = row["estimated"] / 2**20, row["measured"] / 2**20
        print(f"| {row['model']} | {row['shape']} | {estimate:,.0f} | {peak:,.0f} | {estimate / peak:.2f} |")
    print(f"\nThe longest estimate took {max(row['seconds'] for row in found):.1f} s.")


if __name__ == "__main__":
    main()
