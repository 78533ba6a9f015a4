"""The code between a layer and the one that takes the gated result, called again on chosen values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from na_lora_lightning.core.discovery.blocks import Blocks, ancestors
from na_lora_lightning.core.discovery.functional_probe import FunctionalGate, identify, is_linear_in, keeps_tokens_apart
from na_lora_lightning.core.discovery.trace import LinearCall, ModuleCall
from na_lora_lightning.core.discovery.tracing import ACTIVATION_FUNCTIONS, first_argument

# A gate may be normalised before it is taken,
_NORMS = (functional.layer_norm, torch.layer_norm, functional.rms_norm, torch.rms_norm, functional.normalize)
# or its channels may be mixed by hand. What an activation function makes is a gate as what a module makes is, unless
# tokens are mixed too, as in state spaces.
_Call = Literal["norm", "function"]
# Attention, state spaces and hyper-connections do this, and gates do not.
MIXED = "is not linear, and does not work channel by channel"


class _ReachedError(Exception):
    """Ends a forward pass when the gated result is there."""


class _LastCall(TorchFunctionMode):
    """Keeps what the last normalising function was given, and what the last activation function made."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[_Call, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NORMS:
            self.kept["norm"] = first_argument(args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func in ACTIVATION_FUNCTIONS:
            self.kept["function"] = result
        return result


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


class Code:
    """The code between a layer and the one that takes the gated result, which is called again on chosen values.

    It is called as a part of the innermost module whose call held all of these layers: containers that are never
    called themselves do not count.
    """

    def __init__(self, blocks: Blocks, producer: LinearCall, producers: list[LinearCall], consumer: LinearCall) -> None:
        self._blocks = blocks
        self._producer = producer
        self._producers = producers
        self._consumer = consumer
        together = zip(*(call.within for call in (consumer, *producers)), strict=False)
        shared = [calls[0] for calls in together if all(call is calls[0] for call in calls)]
        self._depth = len(shared) - 1
        self._owner: ModuleCall = shared[-1]
        # A cache of keys and values has grown in the first call, and would in each further one.
        grown = {name for name, value in self._owner.kwargs.items() if hasattr(value, "get_seq_length")}
        self._kwargs = {name: None if name in grown else value for name, value in self._owner.kwargs.items()}
        self._is_random = False

    def key(self) -> tuple[Any, ...]:
        """What the code can depend on: pieces of code that are alike in this are alike."""
        owner, start = self._owner.module, len(self._owner.name)
        settings = [
            (name, value if isinstance(value, (str, int, float, bool, type(None))) else id(value))
            for name, value in vars(owner).items()
            if not name.startswith("_")
        ]
        passed = frozenset(self._blocks.inputs[id(self._consumer)].passed)
        places = (self._place(self._producer)[start:], self._place(self._consumer)[start:])
        return type(owner), repr(owner), tuple(settings), passed, places

    def _place(self, call: LinearCall) -> str:
        return f"{call.name} {call.indices[self._depth]}"

    def identify(self) -> FunctionalGate | str | None:
        """The gate in it; what keeps it from being one that can be told; None where the code is linear."""
        assert self._producer.output is not None
        like = self._producer.output.detach()
        shards = self._blocks.trace.shards
        with shards.whole(self._owner.module):
            # A unit has to finish what it has begun.
            to_the_end = shards.has_unit_in(self._owner.module)
            try:
                for place in self._places(to_the_end, like):
                    gate = identify(self._answer(place, to_the_end), like)
                    if self._is_random:
                        return "draws random numbers"
                    # What mixes channels behind a function is no gate for that, unless the function is known.
                    if gate is not None and (place != "function" or gate.activation is not None):
                        return gate
                linear = is_linear_in(self._answer(None, to_the_end), like)
            except Exception as error:  # Whatever code that was written for one call raises in another.
                if "modified by an inplace operation" in str(error):
                    # As linear attention is written, and no gate.
                    return MIXED
                return f"could not be called again on other values ({type(error).__name__}: {error})"
        return None if linear else MIXED

    def _modules_on_the_way(self) -> list[nn.Module]:
        """Childless modules before the consumer, such as a norm, that are given what the layers make alone."""
        producers = set(self._producers)
        inside = set(self._owner.module.modules())
        return list(
            dict.fromkeys(
                call.module
                for call in self._blocks.trace.activation_calls
                if call.module in inside
                and self._blocks.trace.call_counts[call.module] == 1
                and set(self._blocks.linear_calls(ancestors(call.pre_activation.grad_fn).leaves)) == producers
            )
        )

    def _places(self, to_the_end: bool, like: Tensor) -> Iterator[nn.Module | _Call | None]:
        """Where the gated result may be: with the consumer, a module or a function that normalises it, or its maker."""
        yield from (None, *self._modules_on_the_way())
        answer = self._answer(None, to_the_end)
        with _LastCall() as last:
            answer(like)
        yield from (place for place in last.kept if place == "norm" or keeps_tokens_apart(answer, like))

    def _answer(self, place: nn.Module | _Call | None, to_the_end: bool) -> Callable[[Tensor], Tensor]:
        """Maps an output of the layer to what ``place`` (or the consumer) takes; other layers put out ones."""
        depth = self._depth
        wanted: dict[nn.Module, dict[int, LinearCall]] = {}
        for call in self._producers:
            wanted.setdefault(call.module, {})[call.indices[depth]] = call
        of_consumer = (self._consumer.module, self._consumer.indices[depth])
        target, at = (place, 0) if isinstance(place, nn.Module) else of_consumer

        def answer(output: Tensor) -> Tensor:
            taken: list[Tensor] = []
            calls: Counter[nn.Module] = Counter()
            calls_of_target = 0
            random_state: Tensor | None = None

            def put(module: nn.Module, args: Any, result: Tensor) -> Tensor | None:
                nonlocal random_state
                call = wanted[module].get(calls[module])
                calls[module] += 1
                if call is None:
                    return None
                random_state = _random_state(result.device) if random_state is None else random_state
                # A copy, as what follows may work in place.
                return output.to(result.dtype).clone() if call is self._producer else torch.ones_like(result)

            def take(module: nn.Module, args: Any, kwargs: Any) -> None:
                nonlocal calls_of_target
                calls_of_target += 1
                if calls_of_target - 1 == at:
                    taken.append(first_argument(args, kwargs) if last is None else last.kept[place])
                    assert random_state is not None
                    self._is_random |= not torch.equal(random_state, _random_state(output.device))
                    if not to_the_end:
                        raise _ReachedError

            with ExitStack() as stack:
                last = stack.enter_context(_LastCall()) if isinstance(place, str) else None
                for module in wanted:
                    stack.callback(module.register_forward_hook(put).remove)
                stack.callback(target.register_forward_pre_hook(take, with_kwargs=True).remove)
                with suppress(_ReachedError):
                    self._owner.module(*self._owner.args, **self._kwargs)
            return taken[0].float()

        return answer
