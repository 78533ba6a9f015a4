"""One training of the comparison of frameworks: run by ``frameworks.py``, which tells it when to step.

All arms train the same model on the same records: LoRA of rank 16 on all linear layers, AdamW, batches of 8 records, no
clipping, no checkpoints; a float32 base, or a bfloat16 one with a float32 adapter if that is asked for. Each is written
as the documents of its framework show it, with the defaults that has.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

RANK, ALPHA, RATE, ROWS = 16, 32, 2e-4, 8
STEPS = 1_000_000
ARMS = {
    "floor": "the frozen model, forward and backward to its inputs",
    "peft": "PEFT in a plain loop",
    "peft_dora": "PEFT's DoRA in a plain loop",
    "trainer": "transformers' Trainer and PEFT",
    "trl": "TRL's SFTTrainer",
    "trl_packed": "TRL's SFTTrainer, packed",
    "plain": "this package, plain LoRA",
    "na_lora": "this package, NA-LoRA",
    "na_lora_packed": "this package, NA-LoRA, packed",
    "dora": "this package, DoRA",
}
WORKLOADS = {
    "short": "61 tokens, of which the last 6 are targets",
    "all": "61 tokens, all of them targets",
    "mixed": "15 to 190 tokens, all but the first 8 are targets",
}


def write_records(workload: str, folder: Path, count: int = 2048) -> Path:
    """Records of random digits, each of which is a token to SmolLM2; equal in every process."""
    draw = random.Random(0)
    with (folder / "records.jsonl").open("w") as file:
        for _ in range(count):
            length = draw.randint(15, 190) if workload == "mixed" else 61
            targets = length - 8 if workload == "mixed" else 6
            digits = [draw.choice("0123456789") for _ in range(length - 1)]
            record = {"prompt": "".join(digits[: length - targets]), "completion": "".join(digits[length - targets :])}
            file.write(json.dumps(record) + "\n")
    return folder / "records.jsonl"


def data_of(arm: str, workload: str, model: str) -> Any:
    from na_lora_lightning import InstructionDataModule

    return InstructionDataModule(
        model,
        str(write_records(workload, Path(tempfile.mkdtemp()))),
        batch_size=ROWS,
        loss_on="all" if workload == "all" else "completion",
        use_chat_template=False,
        packing=arm == "na_lora_packed",
    )


class Turns:
    """Lets a training run for as many steps as it is told, measures them, and holds it between two steps otherwise.

    A training calls :meth:`step_begins` wherever its framework says that a step begins, and :meth:`count` for each
    batch that it makes. What it is told comes by lines of standard input: a number of steps, or ``stop``.
    """

    def __init__(self) -> None:
        self._left = 0
        self._counted: dict[str, int] = {"targets": 0, "tokens": 0}
        self._began: tuple[float, float] | None = None
        self._steps = 0
        self._answers = sys.stdout
        sys.stdout = sys.stderr  # what frameworks print is no answer

    def count(self, labels: torch.Tensor, mask: torch.Tensor) -> None:
        """Counts the targets and the real tokens of a batch; both (B, L)."""
        self._counted["targets"] += int((labels != -100).sum())
        self._counted["tokens"] += int(mask.sum())

    def step_begins(self) -> None:
        if self._left == 0:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            now = (time.perf_counter(), time.process_time())
            if self._began is None:
                self._answer({"ready": True})
            else:
                self._answer(
                    {
                        "steps": self._steps,
                        "seconds": now[0] - self._began[0],
                        "processor_seconds": now[1] - self._began[1],
                        "peak_bytes": peak_bytes(),
                        **self._counted,
                    }
                )
            line = sys.stdin.readline().strip()
            if line in ("stop", ""):
                os._exit(0)
            self._left = self._steps = int(line)
            self._counted = {"targets": 0, "tokens": 0}
            self._began = (time.perf_counter(), time.process_time())
        self._left -= 1

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def peak_bytes() -> int:
    """The most memory that this process has held so far: of the GPU if there is one, resident otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Padded:
    """Pads records on the right, and tells the clock what they hold."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __call__(self, records: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(record["input_ids"]) for record in records)
        ids = torch.zeros(len(records), length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, record in enumerate(records):
            end = len(record["input_ids"])
            ids[row, :end] = torch.tensor(record["input_ids"])
            mask[row, :end] = 1
            labels[row, :end] = torch.tensor(record["labels"])
        self._turns.count(labels, mask)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def base_model(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    return model.to(options.device)


def plain_loop(model: Any, device: str, records: list[dict[str, list[int]]], turns: Turns) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE) if trained else None
    if not trained:
        model.enable_input_require_grads()
    model.train()
    for batch in DataLoader(records, batch_size=ROWS, collate_fn=Padded(turns)):  # type: ignore[arg-type]
        turns.step_begins()
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()


def transformers_trainer(options: argparse.Namespace, records: list[dict[str, list[int]]], turns: Turns) -> None:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.step_begins()

    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS,
        "learning_rate": RATE,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
    }
    if options.arm == "trainer":
        model = get_peft_model(base_model(options), lora_config())
        Trainer(
            model,
            TrainingArguments(**arguments),
            data_collator=Padded(turns),  # type: ignore[arg-type]
            train_dataset=Dataset.from_list(records),
            callbacks=[Steps()],
        ).train()
        return
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            turns.count(inputs["labels"], inputs.get("attention_mask", torch.ones_like(inputs["labels"])))
            return super().training_step(model, inputs, *args, **kwargs)

    packed = (
        {"packing": True, "max_length": 512, "per_device_train_batch_size": 2} if options.arm == "trl_packed" else {}
    )
    arguments |= {"gradient_checkpointing": False, "bf16": False, "max_length": None, "shuffle_dataset": False} | packed
    Counted(
        base_model(options),
        SFTConfig(**arguments),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora_config(),
        callbacks=[Steps()],
    ).train()


def this_package(options: argparse.Namespace, data: Any, turns: Turns) -> None:
    from lightning.pytorch import Callback, Trainer

    from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            turns.step_begins()
            turns.count(batch["labels"], batch.get("attention_mask", torch.ones_like(batch["labels"])))

    arm = options.arm
    module = NALoRALightningModule(
        options.model,
        lora={"r": RANK, "alpha": ALPHA, "use_dora": arm == "dora"},  # type: ignore[arg-type]
        dtype=options.dtype,
        adapter={"write": "never"},  # type: ignore[arg-type]
    )
    both = [GateImportanceCallback(warmup_steps=0), StepScaleCallback()] if arm.startswith("na_lora") else []
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu" if options.device == "cpu" else "gpu",
        devices=1,
        callbacks=[*both, Steps()],
        logger=False,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    turns = Turns()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = data_of(options.arm, options.workload, options.model)
    if options.arm in ("plain", "na_lora", "na_lora_packed", "dora"):
        this_package(options, data, turns)
    data.prepare_data()
    data.setup("fit")
    records = data._dataset("train").select_columns(["input_ids", "labels"]).to_list()
    if options.arm in ("floor", "peft", "peft_dora"):
        from peft import get_peft_model

        model = base_model(options)
        if options.arm == "floor":
            model.requires_grad_(False)
        else:
            model = get_peft_model(model, lora_config(use_dora=options.arm == "peft_dora"))
        plain_loop(model, options.device, records, turns)
    else:
        transformers_trainer(options, records, turns)


if __name__ == "__main__":
    main()
