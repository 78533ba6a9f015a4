"""Where the feed-forward blocks of a model are, seen without any of the package's means.

One forward pass of the plain model is watched for calls of functions that activations are made of, and each call is
put down to the module that makes it. What that module is follows from the name of its class. A class that neither
list knows is reported, so that no block goes unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FUNCTIONS = {
    *("silu", "silu_", "gelu", "relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "mish", "softplus"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardtanh", "erf", "logsigmoid", "softsign"),
}
FEED_FORWARD = re.compile(
    r"MLP|Mlp|FFN|FeedForward|Experts?(GLU)?$|Intermediate|Dense(Gated)?A[Cc][Tt]|MoE$|Adapter$|^Sequential$|"
    r"UltrabertPredictionHead$"
)
# Classes of whole layers count where their own linear layers are those of a feed-forward block.
LAYER = re.compile(r"(De|En)coderLayer|AlbertLayer|ConvNext(V2)?Layer|Block$")
# Of diffusers: activations that hold the layer before them, and networks of one vector for each sample.
WITH_PROJECTION = {"GEGLU", "GELU", "ApproximateGELU", "SwiGLU"}
EMBEDDING = re.compile(r"TimestepEmbedding$|AlphaTextProjection$")
LINEAR_PAIRS = ({"proj_mlp", "proj_out"}, {"fc1", "fc2"}, {"ffn", "ffn_output"}, {"pwconv1", "pwconv2"})
NOT_FEED_FORWARD = re.compile(
    r"Attention|Router|Norm(Gated)?$|Mixer|DeltaNet|Indexer|Mamba|HyperConnection|HyperHead|ForgetGate|ResidualGate|"
    r"GatedResidual|GateMLP|Modulation|ConvLayer|AdaLayerNorm|NormZero|NormContinuous|Resnet|MBConv|UNet|Transformer[23]DModel|ConvolutionModule|(Up|Sub)sampl|Embedder$|(?<!Former)Encoder$|ConvEmbedding|PositionalConv|GatedProjection|SparseMoeBlock|Rglru|(?<!Ultrabert)Prediction|LMHead|Pooler|Embedding(?!sV3)|ForCausalLM|ForMaskedLM|ForImageClassification|"
    r"ForConditionalGeneration|Model$|xLSTMLayer"
)


@dataclass(frozen=True)
class Blocks:
    """What one forward pass showed.

    Attributes:
        expected: Functions called by each feed-forward block, by the block's name.
        unknown: Modules with activations whose class is on neither list: name and class.
        not_run: Modules that look like feed-forward blocks and were not called.
    """

    expected: dict[str, set[str]]
    unknown: dict[str, str]
    not_run: list[str]

    def of(self, layer_name: str) -> str | None:
        """The innermost block that a layer of the wrapped model belongs to."""
        plain = re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", layer_name)
        around = [name for name in self.expected if plain == name or plain.startswith(f"{name}.")]
        return max(around, key=len, default=None)


class _Log(TorchFunctionMode):
    """Notes under which modules the functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls: list[tuple[str, tuple[tuple[str, nn.Module], ...]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS and args and isinstance(args[0], Tensor):
            self.calls.append((name, tuple(self.stack)))
        return func(*args, **(kwargs or {}))

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Puts hooks on all modules."""

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                self.stack.append((name, module))

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def is_activation(module: nn.Module) -> bool:
    """Whether a module does nothing but calculate: it holds no matrix."""
    return all(parameter.ndim < 2 for parameter in module.parameters())


def looks_like_feed_forward(module: nn.Module) -> bool | None:
    """Whether a module is a feed-forward block, by the name of its class; None where that does not tell."""
    name = type(module).__name__
    if LAYER.search(name):
        linear = {child for child, _ in module.named_children()}
        return any(pair <= linear for pair in LINEAR_PAIRS)
    if name in WITH_PROJECTION:
        return hasattr(module, "proj") or None
    if EMBEDDING.search(name):
        return True
    if NOT_FEED_FORWARD.search(name) or (name == "Sequential" and not _has_linear_layers(module)):
        return False
    return True if FEED_FORWARD.search(name) else None


def find_blocks(model: nn.Module, inputs: Mapping[str, Any], side: Container[str]) -> Blocks:
    """Runs a plain model once and finds its feed-forward blocks.

    Args:
        model: The model, before LoRA.
        inputs: Arguments of its forward.
        side: Names of the modules of interest.
    """
    log = _Log()
    called: set[nn.Module] = set()
    training = model.training
    with ExitStack() as stack:
        log.watch(model, stack)
        for module in model.modules():
            stack.callback(module.register_forward_hook(lambda module, args, output: called.add(module)).remove)
        stack.callback(model.train, training)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(log)
        model(**inputs)
    expected: dict[str, set[str]] = {}
    unknown: dict[str, str] = {}
    for function, path in log.calls:
        *outer, (name, module) = path
        while outer and is_activation(module) and looks_like_feed_forward(module) is None:
            name, module = outer.pop()
        if name not in side:
            continue
        verdict = looks_like_feed_forward(module)
        if verdict is None:
            unknown[name] = type(module).__name__
        elif verdict:
            expected.setdefault(name, set()).add(function)
    not_run = [
        name
        for name, module in model.named_modules()
        if name in side and module not in called and looks_like_feed_forward(module) and _has_matrices(module)
    ]
    return Blocks(expected, unknown, not_run)


def has_linear_layers_alone(module: nn.Module) -> bool:
    """Whether a module holds two linear layers or more, and no convolution."""
    has_convolution = any(re.match(r"Conv\dd", type(part).__name__) for part in module.modules())
    return _has_linear_layers(module, 2) and not has_convolution


def _has_linear_layers(module: nn.Module, at_least: int = 1) -> bool:
    return sum(type(part).__name__ in ("Linear", "Conv1D") for part in module.modules()) >= at_least


def _has_matrices(module: nn.Module) -> bool:
    """Not a mere container, nor a part of a block."""
    return not isinstance(module, nn.Sequential) and sum(p.ndim >= 2 for p in module.parameters()) > 1
