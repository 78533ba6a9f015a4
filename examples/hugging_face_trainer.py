"""NA-LoRA under the Trainer of Hugging Face transformers: twenty steps on sixteen products.

Run after ``python examples/quickstart/prepare.py``, or give another model as the argument.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.data import DataCollatorForLanguageModeling

from na_lora_lightning import NALoRATrainerCallback
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions

name = sys.argv[1] if len(sys.argv) > 1 else ".cache/quickstart/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
arguments = TrainingArguments(
    output_dir="runs/hugging_face_trainer",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    logging_steps=5,
    dataloader_pin_memory=False,
)
trainer = Trainer(
    model=get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")),
    args=arguments,
    train_dataset=[tokenizer(f"{a} * {b} = {a * b}") for a in (7, 12, 13, 58) for b in (3, 9, 11, 64)],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[NALoRATrainerCallback(ImportanceOptions(warmup_steps=5))],
)
trainer.train()  # logs the loss and what the gates do; each checkpoint is an adapter that plain PEFT loads
