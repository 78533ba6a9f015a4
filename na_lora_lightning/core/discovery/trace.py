"""What a traced forward pass shows: calls of linear layers, activations, stacked experts and the modules around."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from na_lora_lightning.core.experts import RoutedCall
from na_lora_lightning.core.sharding import Shards


@dataclass(eq=False)
class ModuleCall:
    """One call of a module with children.

    Attributes:
        name: Its name.
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        linear_calls: Calls of linear layers so far within it, by layer.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    linear_calls: Counter[nn.Module] = field(default_factory=Counter)


@dataclass(eq=False)
class LinearCall:
    """One call of a linear (or LoRA) layer.

    Attributes:
        name: Its name.
        module: The layer.
        source: What it was given.
        leaf: What it was given instead: a leaf of the same shape.
        within: The calls of modules that it was made in, the outermost first.
        indices: Which call of the layer it is in each of these.
        output: What it returned.
    """

    name: str
    module: nn.Module
    source: Tensor
    leaf: Tensor
    within: tuple[ModuleCall, ...] = ()
    indices: tuple[int, ...] = ()
    output: Tensor | None = None


@dataclass(eq=False)
class ExpertsCall:
    """One call of a module that holds stacked experts.

    Attributes:
        name: Its name.
        owner: The module that holds the parameters.
        wrappers: Names and modules of the PEFT wrappers around it, outermost first.
        routed: The routing that it was given.
        gate_argument: What its gate method was given, ``[rows, features]``, where it has one that was called.
    """

    name: str
    owner: nn.Module
    wrappers: list[tuple[str, nn.Module]]
    routed: RoutedCall
    gate_argument: Tensor | None = None


@dataclass(eq=False)
class ActivationCall:
    """One call of a childless module that maps a floating tensor to one of the same shape.

    Attributes:
        name: Its name.
        module: The module.
        index: Which of the module's calls in the forward pass this is.
        pre_activation: Its input.
        output: Its output.
        experts: The experts that were being called, if any.
        index_in_experts: Which call of an activation within that call of the experts this is.
    """

    name: str
    module: nn.Module
    index: int
    pre_activation: Tensor
    output: Tensor
    experts: ExpertsCall | None = None
    index_in_experts: int = 0


@dataclass(eq=False)
class FunctionCall:
    """One call of an activation function.

    Attributes:
        name: The function's.
        node: What autograd has of it.
    """

    name: str
    node: Any


@dataclass
class Trace:
    """What happened in the traced forward pass, in order.

    Attributes:
        shards: How the model's parameters are sharded; those of a layer have to be gathered for gradients through it.
        linear_calls: Calls of linear layers.
        activation_calls: Calls of what may be activation modules.
        function_calls: Calls of activation functions that autograd records, those of activation modules among them.
        experts_calls: Calls of stacked experts.
        module_calls: Calls of modules that have children.
        call_counts: Number of calls of each childless module.
        inputs: What the model was called with.
        samples: Of the batch; None where it cannot be told.
    """

    shards: Shards
    linear_calls: list[LinearCall] = field(default_factory=list)
    activation_calls: list[ActivationCall] = field(default_factory=list)
    function_calls: list[FunctionCall] = field(default_factory=list)
    experts_calls: list[ExpertsCall] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    call_counts: Counter[nn.Module] = field(default_factory=Counter)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None

    def linear_of_leaf(self) -> dict[int, LinearCall]:
        """Maps ``id`` of a leaf to its linear call."""
        return {id(call.leaf): call for call in self.linear_calls}
