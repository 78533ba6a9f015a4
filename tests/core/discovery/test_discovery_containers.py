"""Functional gates, wherever their two linear layers stand; what is seen and not mapped is left out with a reason."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from na_lora_lightning import ImportanceOptions, nonlinearity_aware
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.errors import DiscoveryError

WIDTH, INNER = 8, 12


class Written(nn.Module):
    """A network whose forward pass is ``run``, with its layers in containers that are never called."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def up() -> nn.Linear:
    return nn.Linear(WIDTH, INNER)


def down() -> nn.Linear:
    return nn.Linear(INNER, WIDTH)


def in_a_list(s: Any, x: Tensor) -> Tensor:
    return s.layers[1](functional.gelu(s.layers[0](x)))


def unpacked(s: Any, x: Tensor) -> Tensor:
    first, second = s.layers
    return second(functional.gelu(first(x)))


def by_key(s: Any, x: Tensor) -> Tensor:
    return s.layers["out"](functional.gelu(s.layers["in"](x)))


def nested(s: Any, x: Tensor) -> Tensor:
    for pair in s.layers:
        x = x + pair["mlp"][1](functional.gelu(pair["mlp"][0](x)))
    return x


def separate_lists(s: Any, x: Tensor) -> Tensor:
    for first, second in zip(s.firsts, s.seconds, strict=True):
        x = x + second(functional.gelu(first(x)))
    return x


def by_name(s: Any, x: Tensor) -> Tensor:
    return s.second(input=functional.gelu(s.first(x)))


def in_a_plain_object(s: Any, x: Tensor) -> Tensor:
    if "parts" not in vars(s):
        # No submodule: torch does not see what is in a plain object.
        vars(s)["parts"] = SimpleNamespace(layers=(s.first, s.second))
    return s.parts.layers[1](functional.gelu(s.parts.layers[0](x)))


def twice(s: Any, x: Tensor) -> Tensor:
    """The same layers, one round after another."""
    for _ in range(2):
        x = x + s.layers[1](functional.gelu(s.layers[0](x)))
    return x


class GEGLU(nn.Module):
    """As in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 2 * INNER)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * functional.gelu(gate)


class GELU(nn.Module):
    """As in diffusers: a projection and its activation in one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = up()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.gelu(self.proj(hidden_states), approximate="tanh")


class FeedForward(nn.Module):
    """As in diffusers: a list that is walked through."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleList([activation, nn.Dropout(0.1), down()])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


def normed(s: Any, x: Tensor) -> Tensor:
    return s.second(s.norm(functional.gelu(s.first(x))))


def in_place(s: Any, x: Tensor) -> Tensor:
    return s.layers[1](s.layers[0](x).relu_())


def clamped(s: Any, x: Tensor) -> Tensor:
    return s.layers[1](s.layers[0](x).clamp(min=0))


def by_mask(s: Any, x: Tensor) -> Tensor:
    z = s.layers[0](x)
    return s.layers[1](z * (z > 0))


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    """A checkpoint of the network's own, whatever mode it is in."""

    def run(s: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda y: in_a_list(s, y), x.requires_grad_(), use_reentrant=reentrant)

    return run


class OwnSilu(torch.autograd.Function):
    """What a kernel of somebody's own looks like to autograd."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * z.sigmoid() * (1 + z * (1 - z.sigmoid()))


def own_kernel(s: Any, x: Tensor) -> Tensor:
    return s.layers[1](OwnSilu.apply(s.layers[0](x)))


def pair() -> nn.ModuleList:
    return nn.ModuleList([up(), down()])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], str, str, slice]] = {
    "list": (lambda: Written(in_a_list, layers=pair()), ["layers.0"], "gelu", "plain", slice(0, INNER, 1)),
    "sequential": (
        lambda: Written(in_a_list, layers=nn.Sequential(up(), down())),
        ["layers.0"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "unpacked": (lambda: Written(unpacked, layers=pair()), ["layers.0"], "gelu", "plain", slice(0, INNER, 1)),
    "dictionary": (
        lambda: Written(by_key, layers=nn.ModuleDict({"in": up(), "out": down()})),
        ["layers.in"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "nested": (
        lambda: Written(nested, layers=nn.ModuleList([nn.ModuleDict({"mlp": pair()}) for _ in range(2)])),
        ["layers.0.mlp.0", "layers.1.mlp.0"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "separate lists": (
        lambda: Written(separate_lists, firsts=nn.ModuleList([up(), up()]), seconds=nn.ModuleList([down(), down()])),
        ["firsts.0", "firsts.1"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "by name": (lambda: Written(by_name, first=up(), second=down()), ["first"], "gelu", "plain", slice(0, INNER, 1)),
    "plain object": (
        lambda: Written(in_a_plain_object, first=up(), second=down()),
        ["first"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "twice": (lambda: Written(twice, layers=pair()), ["layers.0"], "gelu", "plain", slice(0, INNER, 1)),
    "geglu": (lambda: FeedForward(GEGLU()), ["net.0.proj"], "gelu", "gated", slice(INNER, 2 * INNER, 1)),
    "gelu": (lambda: FeedForward(GELU()), ["net.0.proj"], "gelu_tanh", "plain", slice(0, INNER, 1)),
    "norm": (
        lambda: Written(normed, first=up(), norm=nn.LayerNorm(INNER), second=down()),
        ["first"],
        "gelu",
        "plain",
        slice(0, INNER, 1),
    ),
    "in place": (lambda: Written(in_place, layers=pair()), ["layers.0"], "relu", "plain", slice(0, INNER, 1)),
    "clamp": (lambda: Written(clamped, layers=pair()), ["layers.0"], "relu", "plain", slice(0, INNER, 1)),
    "mask": (lambda: Written(by_mask, layers=pair()), ["layers.0"], "relu", "plain", slice(0, INNER, 1)),
    **{
        name: (
            lambda reentrant=reentrant: Written(checkpointed(reentrant), layers=pair()),
            ["layers.0"],
            "gelu",
            "plain",
            slice(0, INNER, 1),
        )
        for name, reentrant in (("checkpoint", False), ("reentrant checkpoint", True))
    },
    "kernel": (lambda: Written(own_kernel, layers=pair()), ["layers.0"], "silu", "plain", slice(0, INNER, 1)),
}


def linear_layers(network: nn.Module) -> list[str]:
    """Those that get LoRA; PEFT's layers do not take their input by torch's name for it."""
    named = isinstance(network, Written) and network.run is by_name
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and not (named and n == "second")]


def find(network: nn.Module) -> tuple[nn.Module, GateMap]:
    torch.manual_seed(0)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=linear_layers(network)))
    return model, discover_gates(model, {name: torch.randn(1, 3, WIDTH) for name in arguments(network)})


def arguments(network: nn.Module) -> list[str]:
    return ["x"] if isinstance(network, Written) else ["hidden_states"]


def gated_results(model: nn.Module, site: GateSite, inputs: Tensor) -> list[Tensor]:
    """What the pre-activation is and what comes of it, ``[tokens, channels]`` each, in the first call."""
    seen: list[Tensor] = []
    assert site.output_layer is not None
    handles = [
        site.source.watch(lambda z: seen.append(z.detach().clone())),
        site.output_layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input"]).detach().clone()),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return [value.flatten(0, -2) for value in seen[:2]]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gate_is_found_and_each_row_makes_its_channel(name: str) -> None:
    make, layers, activation, kind, rows = NETWORKS[name]
    model, gates = find(make())
    model.eval()
    assert [site.lora_layer_name for site in gates.require()] == layers
    assert len({site.name for site in gates}) == len(layers)
    inputs = torch.randn(1, 3, WIDTH)
    for site in gates:
        assert (site.activation.name, site.kind, site.row_slice) == (activation, kind, rows)
        (parameter,) = (rows.parameter for rows in site.parameters())
        z, result = gated_results(model, site, inputs)
        for channel in (0, 5, INNER - 1):
            with torch.no_grad():
                parameter[site.rows[channel]] += 1.0
            moved, moved_result = gated_results(model, site, inputs)
            with torch.no_grad():
                parameter[site.rows[channel]] -= 1.0
            assert (moved - z).abs().amax(0).nonzero().flatten().tolist() == [channel]
            if name != "norm":
                assert (moved_result - result).abs().amax(0).nonzero().flatten().tolist() in ([channel], [])


def test_a_list_beside_gates_that_are_found_is_found_too() -> None:
    """One block with an activation module must not hide that the other has none."""

    def run(s: Any, x: Tensor) -> Tensor:
        return in_a_list(s, x + s.down(s.act(s.up(x))))

    _, gates = find(Written(run, up=up(), act=nn.SiLU(), down=down(), layers=pair()))
    assert [(site.lora_layer_name, site.activation.name) for site in gates.require()] == [
        ("up", "silu"),
        ("layers.0", "gelu"),
    ]


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "root mean square": lambda x: functional.rms_norm(x, x.shape[-1:]),
    "length": lambda x: functional.normalize(x, dim=-1),
    "by hand": lambda x: x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt(),
    "softmax": lambda x: x.softmax(-1),
    "groups": lambda x: functional.group_norm(x.flatten(0, 1), 2).view_as(x),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_gate_that_a_function_normalises_is_found(norm: str) -> None:
    """Alone, as the last of several norms, and in a list; what a gate is made of is no gate for being normalised."""
    normalise = NORMS[norm]

    def run(s: Any, x: Tensor) -> Tensor:
        x = x + s.down(normalise(functional.silu(s.up(functional.layer_norm(x, (WIDTH,))))))
        return x + s.layers[1](normalise(functional.gelu(s.layers[0](x)))) + s.straight(normalise(s.other(x)))

    _, gates = find(Written(run, up=up(), down=down(), layers=pair(), other=up(), straight=down()))
    assert [(s.lora_layer_name, s.activation.name, s.kind) for s in gates.require()] == [
        ("up", "silu", "plain"),
        ("layers.0", "gelu", "plain"),
    ]


def test_functions_that_differ_in_settings_alone_are_told_apart() -> None:
    class Block(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor], limit: float) -> None:
            super().__init__()
            self.layers, self.function, self.limit = pair(), function, limit

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.function(self.layers[0](x).clamp(max=self.limit)))

    def run(s: Any, x: Tensor) -> Tensor:
        for block in s.blocks:
            x = block(x)
        return x

    blocks = [Block(functional.silu, 7.0), Block(functional.silu, 5.0), Block(functional.gelu, 7.0)]
    _, gates = find(Written(run, blocks=nn.ModuleList(blocks)))
    found = [(site.activation.name, site.source.channels.highest) for site in gates.require()]  # type: ignore[attr-defined]
    assert found == [("silu", pytest.approx(7.0)), ("silu", pytest.approx(5.0)), ("gelu", pytest.approx(7.0))]


def _in_place(z: Tensor) -> Tensor:
    """The function's result has no gradient after this."""
    functional.silu(z)
    return z.mul_(2).softmax(-1).clamp(max=0.5)


LEFT_OUT: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "sigmoid": (lambda s, x: s.layers[1](s.layers[0](x).sigmoid()), "is not self-gated"),
    "leaky": (lambda s, x: s.layers[1](functional.leaky_relu(s.layers[0](x))), "is of no known form"),
    "other input": (
        lambda s, x: s.layers[1](functional.silu(s.layers[0](x)) * s.other(x.flip(-1) + 1)),
        "which have different inputs",
    ),
    "tokens": (lambda s, x: s.layers[1](functional.silu(s.layers[0](x)).cumsum(1)), "tokens are mixed"),
    "no linear layer": (
        lambda s, x: torch.einsum("bti,wi->btw", functional.silu(s.layers[0](x)), s.layers[1].weight),
        "what silu makes of layers.0 is taken by no linear layer that is called",
    ),
    "channels": (
        lambda s, x: s.layers[1](s.layers[0](x).softmax(-1).clamp(max=0.5)),
        "is not linear, and does not work channel by channel",
    ),
    "changed in place": (
        lambda s, x: s.layers[1](_in_place(s.layers[0](x).clone())),
        "is not linear, and does not work channel by channel",
    ),
    "random": (
        lambda s, x: s.layers[1](functional.dropout(functional.gelu(s.layers[0](x)), 0.001, training=True)),
        "draws random numbers",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_bends_and_is_no_gate_is_left_out_with_its_reason(name: str) -> None:
    run, reason = LEFT_OUT[name]
    _, gates = find(Written(run, layers=pair(), other=up()))
    assert not gates.sites
    assert "layers.0" in [name for entry in gates.left_out for name in entry.producers]
    # A result that is dropped is no gate, which the graph does not tell.
    dropped = "what silu makes of layers.0 is taken by no linear layer"
    reasons = [entry.reason for entry in gates.left_out if name != "changed in place" or dropped not in entry.reason]
    assert reasons
    assert all(reason in given for given in reasons)


def test_code_that_cannot_be_called_again_is_refused_by_name() -> None:
    def once(s: Any, x: Tensor) -> Tensor:
        if vars(s).setdefault("used", []):
            raise RuntimeError("only once")
        s.used.append(1)
        return in_a_list(s, x)

    def run(s: Any, x: Tensor) -> Tensor:
        return s.down(s.act(s.up(x))) + s.block(x)

    _, gates = find(Written(run, up=up(), act=nn.SiLU(), down=down(), block=Written(once, layers=pair())))
    with pytest.raises(
        DiscoveryError, match=r"block\.layers\.0.* could not be called again .*only once.*allow_unmasked"
    ):
        gates.require()
    assert len(gates.require(allow_unmasked_gates=True)) == 1


def test_straight_lines_are_no_gates() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x + 1.0

    _, gates = find(Written(lambda s, x: s.second(s.scale(s.first(x))), first=up(), scale=Scale(), second=down()))
    assert (gates.sites, gates.left_out) == ([], [])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_network_that_checkpoints_itself_trains_as_one_that_does_not(reentrant: bool) -> None:
    def trained(run: Callable[[Any, Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        network = Written(run, layers=pair())
        model = get_peft_model(network, LoraConfig(r=2, target_modules=linear_layers(network), init_lora_weights=False))
        adapters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=0.1)
        x = torch.randn(2, 5, WIDTH)
        weights = []
        with nonlinearity_aware(
            model,
            optimizer,
            importance=ImportanceOptions(keep_fraction=0.5, warmup_steps=1, refresh_every=1),
            example_inputs={"x": x},
        ) as controller:
            for _ in range(4):
                model(x.clone()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                weights.append(controller.weights.clone())
        return adapters, weights

    adapters, weights = trained(checkpointed(reentrant))
    assert int((weights[-1] == 0).sum()) == INNER // 2
    for one, other in zip((*adapters, *weights), (x for part in trained(in_a_list) for x in part), strict=True):
        assert torch.equal(one, other)


def test_a_cache_that_a_call_has_filled_is_not_given_again() -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen = torch.zeros(1, 0, INNER)

        def get_seq_length(self) -> int:
            return self.seen.shape[1]

        def update(self, z: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, z], dim=1)
            return self.seen

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = pair()

        def forward(self, x: Tensor, past: Cache | None = None) -> Tensor:
            z = self.layers[0](x)
            seen = z if past is None else past.update(z)
            return self.layers[1](z * seen.sigmoid())

    _, gates = find(Written(lambda s, x: s.block(x, past=Cache()), block=Block()))
    assert [site.name for site in gates.require()] == ["block.layers.silu"]
