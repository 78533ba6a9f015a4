"""A tiny, randomly initialised model of every type in transformers' mappings, from its configuration alone.

``build("causal-lm", "llama")`` gives the model with the arguments of a training step. From ``tests``,
``python -m zoo.tiny_models [mapping] [type ...]`` tries them all, forward and backward.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from zoo import diffusion
from zoo.diffusion import DENOISERS
from zoo.images_and_sound import IMAGES, image, recordings, safe_image
from zoo.inputs import SPECIAL, Mapping, lengths_of_its_own, shifted, some_labels, text_inputs
from zoo.overrides import FOR_MAPPING
from zoo.shrink import tiny_config

MAPPINGS: dict[str, Any] = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-encoding": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "diffusers": DENOISERS,
    "speech": {
        **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    },
}

# Why a type cannot be built at all, by mapping.
REASONS: dict[str, dict[str, str]] = {
    "causal-lm": {
        "gemma4_assistant": (
            "transformers 5.23 cannot make it: its configuration demands that all layers share keys and values, "
            "which the attention of Gemma 4 rejects"
        ),
        "gemma4_unified_assistant": (
            "its forward takes hidden states, keys and values of the model that it assists, and gives no loss"
        ),
    },
    "image-classification": {
        "dinat": "it needs the library natten",
        "timm_wrapper": "it needs the library timm",
    },
    "image-text-to-text": {"diffusion_gemma": "its forward takes no labels and gives no loss"},
}


class NotBuildable(Exception):  # noqa: N818 — it is not an error of the caller
    """A model type cannot be built here; the message says why, in one sentence."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny model with the arguments of one training step.

    Args:
        model_type: Its name in the mapping.
        mapping: Which of the mappings.
        model: The model, in training mode and in 32 bits.
        inputs: Keyword arguments of a forward pass that gives a loss, or the states that a loss is made of.
    """

    model_type: str
    mapping: Mapping
    model: PreTrainedModel
    inputs: dict[str, Any]


def model_types(mapping: Mapping) -> list[str]:
    """Every model type of the mapping, sorted."""
    return sorted(MAPPINGS[mapping])


def model_class(mapping: Mapping, model_type: str) -> type[PreTrainedModel]:
    """The class that the mapping names for a type; looked up by name, as the auto classes miss some."""
    name = MAPPINGS[mapping][model_type]
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def config_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that ``cls`` takes: ``config`` or the one of its parts with the class that ``cls`` declares."""
    wanted = cls.config_class
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in parts if isinstance(part, wanted)), config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' log and Python's warnings."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)


@contextlib.contextmanager
def unset_memory_is_nan() -> Iterator[None]:
    """Parameters that nothing initialises hold NaN instead of what was in memory, and so can be found."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def liven(model: nn.Module, seed: int) -> None:
    """Gives random values to every parameter that is all zero or was never set, and to the biases of routers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (not parameter.isfinite().all() or not parameter.any()):
            parameter.normal_(0.0, 0.1, generator=generator)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point() and not (buffer.isfinite().all() and buffer.any()):
            buffer.normal_(0.0, 0.05, generator=generator)
        elif name.endswith("tid2eid"):  # The experts of each token, where these do not depend on the hidden state.
            buffer.copy_(torch.rand(len(buffer), 4, generator=generator).argsort(-1)[:, : buffer.shape[1]])


def make_inputs(
    mapping: Mapping,
    model_type: str,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The arguments of a training step of a model of class ``cls``."""
    accepted = inspect.signature(cls.forward).parameters
    if mapping == "image-classification" and model_type != "shieldgemma2":
        return image(config, generator) if model_type not in IMAGES else IMAGES[model_type](config, generator)
    if mapping == "speech" and (model_type == "pop2piano" or "input_ids" not in accepted):
        return recordings(config, accepted, generator)
    inputs = text_inputs(cls.forward, config, generator)
    if mapping == "image-classification":
        return safe_image(inputs, config, generator)
    if mapping in ("causal-lm", "image-text-to-text") or (mapping in ("seq2seq", "speech") and model_type in SPECIAL):
        return SPECIAL[model_type](inputs, config, generator) if model_type in SPECIAL else inputs
    if mapping == "text-encoding":
        del inputs["labels"]
    elif "decoder_input_ids" in accepted:
        inputs = lengths_of_its_own(inputs, generator)
        if model_type == "fsmt":
            inputs = shifted(inputs, config, generator)
    elif mapping == "masked-lm":
        inputs = some_labels(inputs)
    return inputs


def build(mapping: Mapping, model_type: str, seed: int = 0, **values: Any) -> TinyModel:
    """Builds a tiny model with random weights; the same seed gives the same bits.

    Args:
        mapping: The mapping that names the class of the model.
        model_type: A type of the mapping.
        seed: Of the weights and of the inputs.
        **values: Values of the configuration that differ from the defaults of the type, such as ``is_moe=True``.

    Raises:
        NotBuildable: The type needs what is not here; the message says what.
    """
    if mapping == "diffusers":
        if find_spec("diffusers") is None:
            raise NotBuildable("it needs the library diffusers")
        denoiser, arguments = diffusion.build(model_type, seed)
        liven(denoiser, seed)
        return TinyModel(model_type, mapping, denoiser.float().train(), arguments)
    if model_type in REASONS.get(mapping, {}):
        raise NotBuildable(REASONS[mapping][model_type])
    with quiet():
        cls = model_class(mapping, model_type)
        config = config_for(cls, tiny_config(model_type, **values))
        vars(config).update(FOR_MAPPING.get((mapping, model_type), {}))
        with torch.random.fork_rng(devices=[]), unset_memory_is_nan():
            torch.manual_seed(seed)
            model = cls._from_config(config)
    liven(model, seed)
    inputs = make_inputs(mapping, model_type, cls, config, torch.Generator().manual_seed(seed + 1))
    return TinyModel(model_type, mapping, model.float().train(), inputs)


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output, or a sum of its first tensor in which each number has a weight of its own."""
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is None:
        states: Tensor = output[0]
        loss = states.flatten() @ torch.linspace(-1.0, 1.0, states.numel())
    return loss


def check(tiny: TinyModel) -> None:
    """One training step without an update: the loss is finite, and gradients exist."""
    loss = loss_of(tiny.model(**tiny.inputs))
    assert loss.isfinite(), "the loss is not finite"
    loss.backward()
    gradients = [parameter.grad for parameter in tiny.model.parameters() if parameter.grad is not None]
    assert gradients, "no parameter has a gradient"
    assert all(gradient.isfinite().all() for gradient in gradients), "a gradient is not finite"


def main(arguments: list[str]) -> int:
    """Prints for each type whether it can be built and trained, and how long that took."""
    torch.set_num_threads(1)
    wanted = [name for name in arguments if name not in MAPPINGS]
    failed = 0
    mappings: list[Mapping] = [name for name in get_args(Mapping) if name in arguments] or list(get_args(Mapping))
    for mapping in mappings:
        for model_type in [name for name in model_types(mapping) if not wanted or name in wanted]:
            start = time.perf_counter()
            try:
                with quiet():
                    check(build(mapping, model_type))
                outcome = "OK"
            except NotBuildable as reason:
                outcome = f"not buildable: {reason}"
            except Exception as error:
                outcome = f"FAILED: {type(error).__name__}: {error}".replace("\n", " ")[:300]
                failed += 1
                if len(wanted) == 1:
                    raise
            print(f"{mapping} {model_type} {time.perf_counter() - start:.1f} s {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
