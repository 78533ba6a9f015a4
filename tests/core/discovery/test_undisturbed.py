"""Discovery leaves a model and all random numbers as they were, and takes nothing random for a gate."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.discovery.undisturbed import same_random_state
from na_lora_lightning.errors import DiscoveryError

WIDTH = 8

# Whatever of torch.nn needs arguments.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["AdaptiveAvgPool1d", "AdaptiveMaxPool1d", "AvgPool1d", "MaxPool1d"], (WIDTH,)),
    **dict.fromkeys(["ConstantPad1d", "ConstantPad2d", "ConstantPad3d"], (1, 0.0)),
    "LPPool1d": (2, 1),
    **dict.fromkeys(["Linear", "LazyLinear", "Bilinear", "Embedding", "EmbeddingBag"], (WIDTH, WIDTH, WIDTH)),
    **dict.fromkeys(["BatchNorm1d", "InstanceNorm1d", "SyncBatchNorm", "LayerNorm", "RMSNorm", "PReLU"], (WIDTH,)),
    **dict.fromkeys(["Conv1d", "ConvTranspose1d", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"], (8, 8, 1)),
    **dict.fromkeys(["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"], (WIDTH, 2)),
    "AdaptiveLogSoftmaxWithLoss": (WIDTH, 4, [2]),
    "ChannelShuffle": (2,),
    "Fold": (2, 1),
    "GroupNorm": (2, WIDTH),
    "Hardtanh": (),
    "LPPool2d": (2, 2),
    "LPPool3d": (2, 2),
    "LocalResponseNorm": (2,),
    "Threshold": (0.1, 0.0),
    "Transformer": (WIDTH, 2, 1, 1),
    "Unflatten": (1, (2, 4)),
}


def constructed() -> dict[str, nn.Module]:
    """Every module of ``torch.nn`` that can be constructed."""
    found = {}
    for name, kind in vars(nn).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or name.startswith("Lazy"):
            continue
        arguments = ARGUMENTS.get(name)
        attempts = [(), (1,), (2, 2, 1), (2,)] if arguments is None else [arguments, arguments[:2], arguments[:1]]
        for attempt in attempts:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found[name] = kind(*attempt)
            except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError):
                # On a machine with a GPU, DataParallel takes whatever it is given for a module.
                continue
            break
    return found


MODULES = constructed()


class Around(nn.Module):
    """A gate of its own beside ``Linear → module → Linear`` and beside the module between two gates."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        self.first, self.module, self.second = nn.Linear(WIDTH, WIDTH), module, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.act(self.up(x)))
        try:
            between = self.module(self.first(x))
        except Exception:  # Modules that take something else than one tensor are not looked at.
            return x
        return x + self.second(between) if isinstance(between, Tensor) and between.shape == x.shape else x


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that must not change."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # type: ignore[index]
        "python": torch.tensor(random.getstate()[1]),
        "modes": torch.tensor([module.training for module in model.modules()]),
        "requires_grad": torch.tensor([parameter.requires_grad for parameter in model.parameters()]),
        "hooks": torch.tensor([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]),
        **{
            f"gradient of {n}": torch.zeros(0) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        },
        **{f"value of {n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()},
    }


def lora(network: nn.Module, *targets: str) -> nn.Module:
    return get_peft_model(network, LoraConfig(r=2, target_modules=list(targets)))


def assert_undisturbed(model: nn.Module, inputs: dict[str, Any]) -> Any:
    before = state_of(model)
    gates = discover_gates(model, inputs)
    after = state_of(model)
    assert before.keys() == after.keys()
    different = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert different == []
    return gates


def test_nearly_all_of_torch_is_constructed() -> None:
    kinds = [n for n, k in vars(nn).items() if isinstance(k, type) and issubclass(k, nn.Module) and "Lazy" not in n]
    left = {name for name in kinds if name not in MODULES}
    assert len(MODULES) > 130
    # The others are no layers, or stacks of layers that stand for themselves.
    assert left <= {"CrossMapLRN2d", "TransformerEncoder", "TransformerDecoder"} | {
        *("FractionalMaxPool2d", "FractionalMaxPool3d", "LinearCrossEntropyLoss", "RNNBase", "RNNCellBase")
    }


@pytest.mark.parametrize("training", [True, False])
def test_every_module_of_torch_stays_as_it_was(training: bool) -> None:
    for name, module in constructed().items():
        torch.manual_seed(3)
        model = lora(Around(module).train(training), "up", "first").train(training)
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.ones_like(parameter)
        gates = assert_undisturbed(model, {"x": torch.randn(2, 3, WIDTH)})
        assert "act" in [site.name for site in gates], name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Dropout(0.001),
        lambda: nn.Dropout(0.5),
        lambda: nn.AlphaDropout(0.001),
        lambda: nn.FeatureAlphaDropout(0.1),
        lambda: nn.Dropout1d(0.1),
        lambda: nn.RReLU(),
        lambda: Noisy(lambda x: functional.dropout(x, 0.001, training=True)),
        lambda: Noisy(lambda x: functional.silu(x) * torch.empty_like(x).bernoulli_(0.999)),
        lambda: Noisy(lambda x: functional.gumbel_softmax(x, dim=-1)),
        lambda: Noisy(functional.silu, lambda x: functional.silu(x + 0.001 * torch.randn_like(x))),
        lambda: Noisy(lambda x: x, stochastic_depth),
    ],
)
def test_nothing_random_is_a_gate(make: Callable[[], nn.Module], seed: int, training: bool) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, WIDTH))
    model = lora(network, "0").train(training)
    torch.manual_seed(seed)
    gates = assert_undisturbed(model, {"input": torch.randn(2, 3, WIDTH)})
    assert gates.sites == []


class Noisy(nn.Module):
    """Computes one function in evaluation and another one in training."""

    def __init__(self, function: Callable[[Tensor], Tensor], trained: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function, self.trained = function, trained or function

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x) if self.training else self.function(x)


def stochastic_depth(x: Tensor) -> Tensor:
    keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(0.9)
    return x * keep / 0.9


def test_random_activations_are_refused_with_their_reason() -> None:
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RReLU(), nn.Linear(WIDTH, WIDTH))
    gates = discover_gates(lora(network, "0"), {"input": torch.randn(1, 3, WIDTH)})
    assert [(entry.name, entry.reason) for entry in gates.left_out] == [
        ("1", "it draws random numbers, so its derivative says nothing of a channel")
    ]
    with pytest.raises(DiscoveryError, match=r"cannot be masked \(1\): it draws random numbers"):
        gates.require()


class Remembering(nn.Module):
    """Changes in every way that a module can be changed by its calls, in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        self.norm = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.old_norm = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.batch_norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("cache", None)
        self.calls = 0
        self.last: Tensor | None = None
        self.way, self.attention = "sparse", nn.Linear(WIDTH, WIDTH)
        self.outputs: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(4)

    seen: Tensor
    cache: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.cache = x.detach().clone()
        self.calls += 1
        self.last = x
        # As BigBird, which exchanges its attention for another where there are few tokens.
        self.way, self.attention = "full", nn.Linear(WIDTH, WIDTH)
        self.outputs.append(x)
        random.random()
        np.random.rand(2)
        torch.rand(2, generator=self.generator)
        x = x + torch.rand(()) * self.down(self.act(self.up(x)))
        return self.batch_norm(self.norm(x) + self.old_norm(x))


def test_what_a_module_remembers_is_put_back() -> None:
    model = lora(Remembering(), "up").train()
    inner: Any = model.base_model.model  # type: ignore[union-attr]
    inner.batch_norm.eval()
    drawn, attention = inner.generator.get_state(), inner.attention
    gates = assert_undisturbed(model, {"x": torch.randn(2, 3, WIDTH)})
    assert len(gates.require()) == 1
    assert (inner.calls, inner.last, inner.outputs, inner.cache) == (0, None, [], None)
    assert torch.equal(inner.generator.get_state(), drawn)
    assert (inner.way, inner.attention, inner.attention.training) == ("sparse", attention, True)
    inner.norm.requires_grad_(True)
    model(torch.randn(2, 3, WIDTH)).sum().backward()


@pytest.mark.parametrize("initialised", [False, True])
def test_random_states_of_all_cuda_devices_are_kept_once_they_are_in_use(
    monkeypatch: pytest.MonkeyPatch, initialised: bool
) -> None:
    """Whatever the devices of the model: layers that are offloaded run elsewhere."""
    kept: list[tuple[str, list[int]]] = []

    @contextmanager
    def fork(devices: list[int], device_type: str = "cuda") -> Iterator[None]:
        kept.append((device_type, devices))
        yield
        kept.append(("restored", devices))

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with same_random_state(nn.Linear(2, 2, device="meta")):
        assert kept == [("cuda", []), ("cuda", [0, 1])][: 1 + initialised]
    assert kept[1 + initialised :] == [("restored", [0, 1]), ("restored", [])][1 - initialised :]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_random_state_of_a_device_is_kept_for_a_model_that_is_not_there() -> None:
    before = torch.cuda.get_rng_state()
    with same_random_state(nn.Linear(2, 2)):
        torch.rand(4, device="cuda")
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_an_error_in_the_probe_leaves_everything_as_it_was() -> None:
    class Failing(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no")

    model = lora(Failing(), "up").train()
    inputs = {"x": torch.randn(2, 3, WIDTH)}
    before = state_of(model)
    with pytest.raises(Exception, match="no"):
        discover_gates(model, inputs)
    after = state_of(model)
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
