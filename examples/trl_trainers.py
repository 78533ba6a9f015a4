"""NA-LoRA under TRL's SFTTrainer, and then its DPOTrainer on the same adapter: ``pip install trl``.

Run after ``python examples/quickstart/prepare.py``, or give another model as the argument.
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from na_lora_lightning import NALoRATrainerCallback

name = sys.argv[1] if len(sys.argv) > 1 else ".cache/quickstart/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
common = {"max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 5, "dataloader_pin_memory": False}
products = [(a, b) for a in (7, 12, 13, 58) for b in (3, 9, 11, 64)]

sft = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
    args=SFTConfig("runs/trl_sft", learning_rate=1e-3, bf16=False, **common),
    train_dataset=Dataset.from_list([{"prompt": f"{a} * {b} =", "completion": f" {a * b}"} for a, b in products]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[NALoRATrainerCallback({"warmup_steps": 5})],
)
sft.train()

dpo = DPOTrainer(
    model=sft.model,  # without the adapter it is the reference, whose passes have no gradient and are not counted
    args=DPOConfig("runs/trl_dpo", learning_rate=1e-3, bf16=False, **common),
    train_dataset=Dataset.from_list(
        [{"prompt": f"{a} * {b} =", "chosen": f" {a * b}", "rejected": f" {a + b}"} for a, b in products]
    ),
    processing_class=tokenizer,
    callbacks=[NALoRATrainerCallback({"warmup_steps": 5})],
)
dpo.train()  # each checkpoint is an adapter that plain PEFT loads
