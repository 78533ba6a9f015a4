"""Teach a language model to see digits, and fine-tune both with NA-LoRA on questions about them.

Run from the project folder::

    python examples/vlm_digits/run.py                          # every stage that is not there yet
    python examples/vlm_digits/run.py --method lora --seed 1   # plain LoRA, everything else the same

It prints the accuracy on held-out questions before and after, and writes ``runs/vlm_digits/predictions.png``.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import replace
from pathlib import Path

import caching
from settings import ExampleError, Settings

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
# To be raised when the code of a stage changes what it makes.
VERSION = 1


def main(arguments: list[str] | None = None, settings: Settings | None = None) -> int:
    """Run the example.

    Args:
        arguments: Command line; the process's own if None.
        settings: The numbers of every stage; the defaults if None.

    Returns:
        Exit status: 0, or 2 after an error that the user can fix.
    """
    parser = argparse.ArgumentParser(description="A vision-language model of digits, fine-tuned with NA-LoRA.")
    parser.add_argument("--method", choices=("na", "lora"), default="na", help="NA-LoRA or plain LoRA")
    parser.add_argument("--seed", type=int, default=0, help="of LoRA's weights and the order of the questions")
    parser.add_argument("--learning-rate", type=float, help="largest learning rate of LoRA (default: 1e-3)")
    parser.add_argument("--model-folder", type=Path, help="a local copy of SmolLM2-135M-Instruct: no download")
    parser.add_argument("--fast", action="store_true", help="a few minutes, to see that it works")
    parser.add_argument("--again", action="store_true", help="fine-tune again, even if this very run is there already")
    options = parser.parse_args(arguments)
    settings = settings or Settings()
    if options.model_folder is not None:
        if not (options.model_folder / "config.json").is_file():
            print(f"Error: Folder {options.model_folder} holds no model: name one with config.json.", file=sys.stderr)
            return 2
        settings = replace(settings, language_model=options.model_folder)
    if options.fast:
        settings = settings.fast()
    if options.learning_rate is not None:
        settings = replace(settings, learning_rate=options.learning_rate)
    try:
        run(settings, options.method, options.seed, options.again)
    except ExampleError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: finished stages were kept; run it again.", file=sys.stderr)
        return 130
    return 0


def run(settings: Settings, method: str, seed: int, again: bool = False) -> Path:
    """Do every stage that is not there yet, and show the result.

    Args:
        settings: The numbers of every stage.
        method: ``"na"`` or ``"lora"``.
        seed: Seed of LoRA.
        again: Whether to repeat the last stage.

    Returns:
        The folder of the last stage.
    """
    ensure_language_model(settings.language_model)
    # These take seconds to import, and the command line's help needs none of them.
    import digits
    import fine_tuning
    import picture
    import stages
    from transformers.utils import logging

    logging.disable_progress_bar()
    cache, counts = settings.cache, (settings.train_questions, settings.held_out_questions)
    data_key = caching.fingerprint(version=VERSION, counts=counts)
    data = caching.stage(cache / "data", data_key, "Questions", lambda folder: digits.write_data(folder, *counts))
    tower_key = caching.fingerprint(
        version=VERSION, sizes=(settings.hidden_size, settings.layers), epochs=settings.tower_epochs
    )
    tower = caching.stage(
        cache / "tower", tower_key, "Vision tower", lambda folder: stages.train_tower(folder, settings)
    )
    steps = settings.alignment_steps, settings.projector_steps, settings.projector_batch_size
    model_key = caching.fingerprint(tower=tower_key, language_model=settings.language_model.resolve(), steps=steps)
    model = caching.stage(
        cache / "model", model_key, "Projector", lambda folder: stages.train_model(folder, tower, settings)
    )
    before = caching.stage(
        cache / "before",
        caching.fingerprint(data=data_key, model=model_key),
        "Answers before LoRA",
        lambda folder: fine_tuning.answer_untrained(folder, model, data, settings),
    )
    name = f"{method}-seed{seed}"
    if settings.learning_rate != Settings.learning_rate:
        name += f"-lr{settings.learning_rate:g}"
    if again:
        caching.forget(settings.runs / name)
    key = caching.fingerprint(
        data=data_key,
        model=model_key,
        training=(settings.epochs, settings.batch_size, settings.learning_rate, settings.rank, settings.keep_fraction),
        method=method,
        seed=seed,
    )
    title = "NA-LoRA" if method == "na" else "Plain LoRA"
    after = caching.stage(
        settings.runs / name,
        key,
        title,
        lambda folder: fine_tuning.fine_tune(folder, model, data, settings, method, seed),
    )
    questions = digits.read_questions(data / "held_out.jsonl")
    answers = fine_tuning.read_answers(before), fine_tuning.read_answers(after)
    first, last = (fine_tuning.accuracies(questions, given) for given in answers)
    print(f"\nHeld-out questions ({len(questions)})   before    after")
    for kind in first:
        print(f"  {kind:<22} {first[kind]:>8.1%} {last[kind]:>8.1%}")
    path = settings.runs / "predictions.png"
    picture.draw_answers(path, data, questions, *answers, f"Held-out questions, before and after {title}")
    print(f"\nPicture  {path}\nAdapter  {after / 'adapter'}\nCurves   tensorboard --logdir {settings.runs}")
    print(f"Memory   {peak_memory():.1f} GB at most")
    return after


def ensure_language_model(folder: Path) -> None:
    """Get the language side, as the quick start does, unless it is there.

    Args:
        folder: Its folder.

    Raises:
        ExampleError: It cannot be got.
    """
    if str(QUICKSTART) not in sys.path:
        # Behind this example's own files.
        sys.path.append(str(QUICKSTART))
    from pretrained import SMOLLM2, QuickstartError
    from weights import ensure_weights

    try:
        ensure_weights(SMOLLM2, folder)
    except QuickstartError as error:
        raise ExampleError(str(error)) from error


def peak_memory() -> float:
    """Largest resident memory of this process, in 10⁹ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
