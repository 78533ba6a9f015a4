#!/bin/bash
# The quick start's commands with an installed package, away from the repository: installed.sh BIN MODEL DATA
# BIN: the environment's folder of programs; MODEL: a model's folder; DATA: its train.jsonl and held_out.jsonl.
set -euo pipefail
bin=$(realpath "$1") model=$(realpath "$2") data=$(realpath "$3")
cd "$(mktemp -d)"
na_lora=("$bin/na-lora")
quickly=(--trainer.max_steps 3 --trainer.limit_val_batches 1 --trainer.accelerator cpu --trainer.enable_progress_bar false
  --model.evaluation.generate false)

"${na_lora[@]}" --version
"${na_lora[@]}" init quickstart
"${na_lora[@]}" inspect "$model" --memory false
"${na_lora[@]}" fit --config run.yaml --model.model_name_or_path "$model" --data.train "$data/train.jsonl" \
  --data.validation "$data/held_out.jsonl" "${quickly[@]}"
run=runs/quickstart/version_0
"${na_lora[@]}" validate --config run.yaml --adapter $run --model.model_name_or_path "$model" \
  --data.train "$data/train.jsonl" --data.validation "$data/held_out.jsonl" "${quickly[@]:2}"
head -n 2 "$data/held_out.jsonl" > prompts.jsonl
"${na_lora[@]}" predict --adapter $run --model.model_name_or_path "$model" --data.predict prompts.jsonl \
  --trainer.accelerator cpu --model.evaluation.max_new_tokens 5
echo "How many sides has a hexagon?" | "${na_lora[@]}" chat $run --base "$model" --max_new_tokens 5
"${na_lora[@]}" merge --adapter $run --base "$model" --output merged
"${na_lora[@]}" report $run
test -s merged/model.safetensors -a -s $run/report.html
echo "All of it works in $(pwd)."
