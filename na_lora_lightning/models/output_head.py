"""The output head of a language model by itself: from hidden states of any number of tokens to their logits.

What a model does to logits beyond its head (scales, caps, biases) is in its ``forward`` alone. So that method is run
again for each piece of the hidden states, with their place taken where the model's body would have computed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from na_lora_lightning.core.discovery.undisturbed import undisturbed
from na_lora_lightning.core.model_entry import root_of, vocabulary_size
from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.errors import one_line

_HIDDEN = "last_hidden_state"
# Of a probe that tells whether rows of hidden states can be taken out of their places.
_SHAPE = (2, 6)


class OutputHead:
    """The output head of a model; make it with :func:`output_head`.

    Args:
        root: The Hugging Face model, with LoRA in it or not.

    Attributes:
        rows: Number of logits of a token.
    """

    def __init__(self, root: nn.Module) -> None:
        name = getattr(root, "base_model_prefix", "")
        if not isinstance(root._modules.get(name), nn.Module):
            raise TypeError(f"{type(root).__name__} has no part that computes hidden states alone")
        # What is found out is kept by model, which it must not keep alive.
        self._root = ref(root)
        self.rows = 0
        self._name = name
        self._output: Any = None
        self._inputs: Mapping[str, Any] = {}

    @property
    def root(self) -> nn.Module:
        """The model."""
        root = self._root()
        assert root is not None, "whoever asks has the model"
        return root

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Calls the model, without its head but for one token a sequence.

        Args:
            model: The model, or what is around it (a PEFT model).
            inputs: Keyword arguments of the call.

        Returns:
            ``[batch, length, hidden]``, with its graph.
        """
        body = _Body(self._body)
        with self._instead(body):
            model(**inputs)
        assert body.output is not None, "the check at the beginning would have failed"
        self._output, self._inputs = body.output, inputs
        hidden: Tensor = body.output[_HIDDEN]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of tokens of the last call.

        Args:
            hidden: ``[tokens, hidden]``, in any order.

        Returns:
            ``[tokens, vocabulary]``.
        """
        with self._instead(_Known(self._body, _with_hidden(self._output, hidden[None]))):
            # Past the hooks of the model, for which this is no forward pass.
            logits: Tensor = self.root.forward(**self._inputs).logits
        return logits[0]

    def forget(self) -> None:
        """Lets go of the last call, whose graph it holds."""
        self._output, self._inputs = None, {}

    @property
    def _body(self) -> nn.Module:
        body = self.root._modules[self._name]
        assert body is not None
        return body

    @contextmanager
    def _instead(self, other: nn.Module) -> Iterator[None]:
        body = self._body
        self.root._modules[self._name] = other
        try:
            yield
        finally:
            self.root._modules[self._name] = body

    @torch.no_grad()
    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the model on a small batch, and its head alone on tokens of it in another order.

        Returns:
            Hidden states ``[tokens, hidden]``, and the logits of both ways, ``[tokens, vocabulary]`` each.
        """
        vocabulary = vocabulary_size(self.root)
        if vocabulary is None:
            raise TypeError(f"{type(self.root).__name__} does not say how many tokens it knows")
        device = next(self.root.parameters()).device
        count = _SHAPE[0] * _SHAPE[1]
        ids = torch.arange(count, device=device).remainder(vocabulary).view(_SHAPE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with undisturbed(self.root):
            expected = self.root.forward(**inputs).logits
            hidden = self.hidden_states(self.root.forward, inputs)
            # One fewer, so that nothing can be made of their number.
            order = torch.arange(count, device=device).mul(5).remainder(count)[1:]
            hidden = hidden.flatten(0, 1)[order]
            found = self.logits(hidden)
        self.forget()
        return hidden, expected.flatten(0, 1)[order], found

    def check(self) -> None:
        """Finds out whether the logits of a token are made of its last hidden state alone.

        Raises:
            Exception: Of any kind, where the model does not work in this way.
        """
        _, expected, found = self.probe()
        if not are_same(expected, found):
            raise ValueError("its logits depend on more than the last hidden state of their token")
        self.rows = expected.shape[1]


def are_same(expected: Tensor, found: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    if expected.shape != found.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= max(4 * torch.finfo(found.dtype).eps, 1e-4) * expected.float().abs().max())


class _Body(nn.Module):
    """Runs the body and keeps its output; passes on the hidden states of one token a sequence."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        # Not as a child, which it would be twice.
        object.__setattr__(self, "_body", body)
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_body"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._body(*args, **kwargs)
        return _with_hidden(self.output, self.output[_HIDDEN][:, :1].detach())


class _Known(_Body):
    """Stands for a body whose output is known."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__(body)
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return type(output)(**{**output, _HIDDEN: hidden})


_checked: WeakKeyDictionary[nn.Module, OutputHead | str] = WeakKeyDictionary()


def output_head(model: nn.Module) -> OutputHead | str:
    """The output head of a model by itself, which is found out at the first call by running the model.

    Args:
        model: A language model, or one of images and text, with or without a PEFT model around it.

    Returns:
        The head, or why the model's head cannot be run by itself, as a clause.
    """
    root = root_of(model)
    if Shards(model):
        return "its parameters are sharded over processes"
    if root not in _checked:
        try:
            head = OutputHead(root)
            head.check()
            _checked[root] = head
        except Exception as error:  # Models are of many kinds, and each fails in a way of its own.
            _checked[root] = one_line(error).rstrip(".")
    return _checked[root]


def assume_output_head(model: nn.Module, vocabulary: int) -> None:
    """Takes it that the head of a model can be run by itself, where its numbers, which would tell, are not there.

    Args:
        model: As :func:`output_head` takes it.
        vocabulary: Number of logits of a token.
    """
    root = root_of(model)
    with suppress(TypeError):
        head = OutputHead(root)
        head.rows = vocabulary
        _checked[root] = head
