"""Which linear layers stand before and behind an activation, and whether together they are a feed-forward block."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from na_lora_lightning.core.discovery.trace import ActivationCall, FunctionCall, LinearCall, Trace
from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer
from na_lora_lightning.core.model_entry import vocabulary_size

# What autograd calls functions that mix tokens.
_MIXING = ("Convolution", "MkldnnConvolution", "CudnnConvolution", "ScaledDotProduct", "Softmax")


@dataclass
class Ancestors:
    """What a walk backwards through an autograd graph meets.

    Attributes:
        leaves: Leaf tensors.
        passed: Names of the node types passed.
        stops: Nodes at which the walk stopped.
        custom: Whether a function that somebody wrote with a backward pass of its own was passed.
        masks: Number of elements of masks that were multiplied with, each of which may have been made of the values
            that it is multiplied with.
        nodes: The nodes passed.
    """

    leaves: list[Tensor] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    stops: list[Any] = field(default_factory=list)
    custom: bool = False
    masks: set[int] = field(default_factory=set)
    nodes: set[Any] = field(default_factory=set)


def ancestors(node: Any, stop_at: Container[Any] = ()) -> Ancestors:
    """Walks an autograd graph backwards.

    Args:
        node: Graph node to start from (``tensor.grad_fn``), or None.
        stop_at: Nodes that are noted and not passed.

    Returns:
        What was met.
    """
    met = Ancestors()
    seen: set[Any] = set()
    pending = [node] if node is not None else []
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in stop_at:
            met.stops.append(current)
            continue
        variable = getattr(current, "variable", None)
        if variable is not None:
            met.leaves.append(variable)
            continue
        met.passed.add(type(current).__name__)
        met.nodes.add(current)
        met.custom |= _is_custom(current)
        met.masks |= _masks_of(current) if type(current).__name__ == "MulBackward0" else set()
        pending.extend(parent for parent, _ in current.next_functions if parent is not None)
    return met


def _is_custom(node: Any) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    # torch has some of its own, for sharding and checkpointing, and so have LoRA layers here.
    return function is not None and not function.__module__.startswith(("torch.", "na_lora_lightning."))


def _masks_of(product: Any) -> set[int]:
    """Number of elements of what autograd multiplies by where these are two values, as in ``(z > 0) * z``."""
    factors = [value for value in (product._saved_self, product._saved_other) if value is not None]
    if len(factors) != 1 or factors[0].is_meta or factors[0].is_complex() or factors[0].numel() < 2:
        return set()
    (factor,) = factors
    if factor.ndim < 2 or not factor.untyped_storage().nbytes():
        # The weights of a norm, or what a sharded layer has given back.
        return set()
    if factor.dtype is not torch.bool:
        least, most = factor.aminmax()
        if not bool((least < most) & ((factor == least) | (factor == most)).all()):
            return set()
    return {factor.numel()}


@dataclass(frozen=True)
class Block:
    """A feed-forward block around one activation.

    Attributes:
        producers: Linear layers that make the pre-activation.
        consumer: The linear layer that takes the gated result.
        kind: ``"gated"`` where another branch is multiplied in, else ``"plain"``.
    """

    producers: tuple[LinearCall, ...]
    consumer: LinearCall
    kind: Literal["gated", "plain"]


class Unadaptable(str):
    """Why a gate cannot be adapted, though it is one."""


def _width_of_heads(root: nn.Module) -> int | None:
    """The vocabulary's size, which tells a head that a model does not name; None where blocks are just as wide."""
    size = vocabulary_size(root)
    get_embeddings = getattr(root, "get_input_embeddings", None)
    try:
        embeddings = get_embeddings() if callable(get_embeddings) else None
    except NotImplementedError:
        embeddings = None
    return None if size == getattr(embeddings, "embedding_dim", None) else size


class Blocks:
    """Answers for every activation of a trace.

    Args:
        root: The model.
        trace: The trace.
        activations: Its calls of activation modules.
    """

    def __init__(self, root: nn.Module, trace: Trace, activations: Iterable[ActivationCall]) -> None:
        self.trace = trace
        self._root = root
        get_head = getattr(root, "get_output_embeddings", None)
        self._head = get_head() if callable(get_head) else None
        self._vocabulary = _width_of_heads(root)
        self._linear_of_leaf = trace.linear_of_leaf()
        self._nodes = {call.output.grad_fn for call in activations if call.output.grad_fn is not None}
        # One walk per linear layer, from its input back to the activations, serves all activations.
        self._consumers: dict[Any, tuple[LinearCall, Ancestors]] = {}
        self.inputs: dict[int, Ancestors] = {}
        for linear in trace.linear_calls:
            met = ancestors(linear.source.grad_fn, stop_at=self._nodes)
            self.inputs[id(linear)] = met
            for node in met.stops:
                self._consumers.setdefault(node, (linear, met))

    def linear_calls(self, leaves: Iterable[Tensor]) -> list[LinearCall]:
        """The linear calls whose leaves are among ``leaves``."""
        return [self._linear_of_leaf[id(leaf)] for leaf in leaves if id(leaf) in self._linear_of_leaf]

    def of_activation(self, call: ActivationCall) -> Block | Unadaptable | str:
        """The block around an activation, or the reason why there is none."""
        holder = self._holder_of_weights(call)
        if holder is not None:
            return Unadaptable(
                f"the weights before it are parameters of {holder} and no linear layer's, in a layout that PEFT's LoRA "
                "cannot adapt expert by expert"
            )
        if call.pre_activation.grad_fn is None or call.output.grad_fn is None:
            return self._without_graph(call)
        producers = self.linear_calls(ancestors(call.pre_activation.grad_fn).leaves)
        if not producers or call.output.grad_fn not in self._consumers:
            return "it does not stand between two linear layers"
        consumer, met = self._consumers[call.output.grad_fn]
        # Another branch shows as a leaf that is reached without passing the activation.
        gated = bool(met.leaves) and any(name.startswith("MulBackward") for name in met.passed)
        branches = [*producers, *self.linear_calls(met.leaves)] if gated else producers
        reason = self.why_not_feed_forward(branches, consumer)
        return reason or Block(tuple(producers), consumer, "gated" if gated else "plain")

    def why_not_feed_forward(self, branches: list[LinearCall], consumer: LinearCall) -> str | None:
        """Why ``branches`` and ``consumer`` are not a feed-forward block; None where they are.

        In one, what the consumer takes is made of the branches token by token and from one input.
        """
        width = getattr(consumer.module, "out_features", None)
        if consumer.module is self._head or (width is not None and width == self._vocabulary):
            return "it belongs to the output head"
        inside = self._inside_of(branches[0].name)
        if inside is not None:
            return f"it is part of {inside}"
        before = [self.linear_calls(ancestors(branch.source.grad_fn).leaves) for branch in branches]

        def is_origin(source: Tensor) -> bool:
            """Whether every branch is given ``source``, or something made of it by other linear layers."""
            return all(
                same_tensor(branch.source, source) or (made_of and all(same_tensor(b.source, source) for b in made_of))
                for branch, made_of in zip(branches, before, strict=True)
            )

        if not any(is_origin(branch.source) for branch in branches):
            names = ", ".join(dict.fromkeys(branch.name for branch in branches))
            return f"what {consumer.name} takes is made by {names}, which have different inputs"
        with self.trace.shards.whole(*(branch.module for branch in branches), consumer.module):
            mixing = next((branch.name for branch in branches if self._mixes_tokens(branch, consumer)), None)
        return None if mixing is None else f"between {mixing} and {consumer.name} tokens are mixed"

    def leads_on(self, call: FunctionCall) -> bool:
        """Whether what a function made is that of an activation module, or part of what a linear layer takes."""
        return call.node in self._nodes or any(call.node in met.nodes for met in self.inputs.values())

    def is_of_vectors(self, call: LinearCall) -> bool:
        """Whether a layer is given one vector for each sample, made of no tokens: an embedding of time, say."""
        before = self.linear_calls(ancestors(call.source.grad_fn).leaves)
        return call.source.ndim == 2 and all(self.is_of_vectors(other) for other in before)

    def _mixes_tokens(self, branch: LinearCall, consumer: LinearCall) -> bool:
        """Whether a token of what the consumer takes depends on other tokens of what the branch is given.

        A norm over all of them, such as global response normalisation, mixes nothing but their scales.
        """
        tokens, taken = _rows(branch.leaf), _rows(consumer.source)
        if tokens <= (self.trace.samples or 1) or tokens != taken:
            # Where a sample is one token, or tokens have become others, what mixes several is told by its name.
            return any(name.startswith(_MIXING) for name in ancestors(consumer.source.grad_fn).passed)
        if not _mixes(consumer.source, branch.leaf):
            return False
        norms = {call.output.grad_fn: call for call in self.trace.activation_calls if _has_vectors_alone(call)}
        between = [norms[node] for node in ancestors(consumer.source.grad_fn, stop_at=norms).stops]
        return not any(
            not _mixes(norm.pre_activation, branch.leaf) and not _mixes(consumer.source, norm.output)
            for norm in between
        )

    def _holder_of_weights(self, call: ActivationCall) -> str | None:
        """The class of a module beside the activation that holds matrices for several experts in some other way."""
        parent = self._root.get_submodule(call.name.rpartition(".")[0])
        beside = [module for module in parent.children() if not (is_linear(module) or is_lora_layer(module))]
        if any(is_linear(module) or is_lora_layer(module) for module in parent.children()):
            return None
        if len([p for p in parent._parameters.values() if p is not None and p.ndim >= 2]) >= 2:
            return type(parent).__name__
        for module in beside:
            stacked = any(p is not None and p.ndim == 3 for p in module._parameters.values())
            if stacked and not isinstance(module, nn.modules.conv._ConvNd):
                return type(module).__name__
        return None

    def _inside_of(self, name: str) -> str | None:
        """The class of an enclosing module that is not a feed-forward block whatever it computes, told by its name.

        Small networks inside these make the weights of a norm, a residual or experts, and select no features.
        """
        parts = name.split(".")
        for length in range(1, len(parts)):
            kind = type(self._root.get_submodule(".".join(parts[:length]))).__name__
            if kind.lower().endswith(("norm", "router")) or "hyper_connection" in parts[length - 1]:
                return kind
        return None

    def _without_graph(self, call: ActivationCall) -> Block | str:
        """Where the model runs without a graph, layers are told by the memory that they share."""
        producer = next(
            (c for c in self.trace.linear_calls if c.output is not None and _share(c.output, call.pre_activation)), None
        )
        consumer = next((c for c in self.trace.linear_calls if _share(c.source, call.output)), None)
        if producer is None or consumer is None:
            return "it does not stand between two linear layers"
        return Block((producer,), consumer, "plain")


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same elements."""
    return one is other or (_share(one, other) and one.numel() == other.numel())


def _has_vectors_alone(call: ActivationCall) -> bool:
    """Whether a module has parameters, and each of them a number for each channel."""
    sizes = {parameter.numel() for parameter in call.module.parameters()}
    return sizes == {call.output.shape[-1]} and call.output.grad_fn is not None


def _rows(values: Tensor) -> int:
    return values.numel() // values.shape[-1]


def _mixes(result: Tensor, source: Tensor) -> bool:
    """Whether the last token of ``result`` depends on other tokens of ``source``, of which it is made."""
    rows = _rows(source)
    if _rows(result) != rows or rows < 2:
        return False
    cotangent = torch.zeros(rows, result.shape[-1], device=result.device, dtype=result.dtype)
    # Unequal values, because a normalisation hides a constant one.
    cotangent[-1] = torch.linspace(1.0, 2.0, result.shape[-1])
    cotangent = cotangent.view(result.shape)
    (gradient,) = torch.autograd.grad(result, source, cotangent, retain_graph=True, allow_unused=True)
    if gradient is None:
        return False
    return bool(gradient.reshape(rows, -1)[:-1].abs().max() > 0)
