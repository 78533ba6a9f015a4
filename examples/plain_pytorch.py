"""NA-LoRA in a plain PyTorch loop: twenty steps on sixteen products.

Run after ``python examples/quickstart/prepare.py``, or give another model as the argument.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from na_lora_lightning import nonlinearity_aware
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions

name = sys.argv[1] if len(sys.argv) > 1 else ".cache/quickstart/SmolLM2-135M-Instruct"
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
products = [f"{a} * {b} = {a * b}" for a in (7, 12, 13, 58) for b in (3, 9, 11, 64)]
batch = tokenizer(products, padding=True, return_tensors="pt")
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

importance = ImportanceOptions(warmup_steps=5)
with nonlinearity_aware(model, optimizer, importance=importance, measure_every=5) as gates:
    for step in range(1, 21):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            curves = [f"{tag} {value:.4f}" for tag, value in gates.metrics().items() if "layer" not in tag]
            print(f"step {step}, loss {loss:.3f}", *curves, sep="\n  ")
model.save_pretrained("runs/plain_pytorch", save_embedding_layers=False)  # an adapter that plain PEFT loads
