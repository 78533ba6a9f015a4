"""The controller in a plain loop: the invariants that need no trainer, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from tiny_models import LLAMA_TARGETS, enable_checkpointing, random_batch, tiny_llama, with_lora
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, DataError, DiscoveryError, UpdateError

ALL_TOKENS = ObserverOptions(max_tokens=None)


def train(
    model: PeftModel,
    steps: int,
    importance: ImportanceOptions | None = None,
    scale: StepScaleOptions | None = None,
    accumulation: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> tuple[list[float], GateController | None]:
    """A plain loop over random batches: losses, and the controller if any mechanism was set."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    controller = None
    if importance is not None or scale is not None:
        controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
        if importance is not None:
            controller.set_importance(importance)
        if scale is not None:
            controller.set_step_scale(scale)
        controller.attach([optimizer])
        controller.meter.enabled = True
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            loss = model(**random_batch(100 * step + micro)).loss / accumulation
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step)
    if controller is not None:
        controller.detach()
    return losses, controller


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora" in name}


def test_keeping_all_rows_is_bitwise_plain_lora(make_peft_model: Callable[..., PeftModel]) -> None:
    plain, watched = make_peft_model(), make_peft_model()
    plain_losses, _ = train(plain, steps=6)
    options = ImportanceOptions(keep_fraction=1.0, warmup_steps=0, refresh_every=1)
    scale = StepScaleOptions(eta_min=1.0, matrix_a_factor=1.0)
    watched_losses, _ = train(watched, steps=6, importance=options, scale=scale)
    assert plain_losses == watched_losses
    expected = state(plain)
    assert all(torch.equal(value, expected[name]) for name, value in state(watched).items())


def test_a_masked_row_does_not_move_under_momentum_and_weight_decay(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    options = ImportanceOptions(keep_fraction=0.3, warmup_steps=2, refresh_every=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    controller.set_importance(options)
    controller.attach([optimizer])
    masked_seen = 0
    for step in range(8):
        model(**random_batch(step)).loss.backward()
        before = {site.name: site.parameters()[0].parameter.detach().clone() for site in controller.gates}
        optimizer.step()
        optimizer.zero_grad()
        for site, weights in zip(
            controller.gates, controller.weights.split([s.channels for s in controller.gates]), strict=True
        ):
            parameter = site.parameters()[0].parameter
            moved = (parameter != before[site.name]).any(dim=1)[site.rows]
            assert torch.equal(moved, weights > 0)
            masked_seen += int((weights == 0).sum())
            if step >= 2:
                assert int((weights > 0).sum()) == max(1, int(0.3 * site.channels + 0.5))
    assert masked_seen > 0


def test_forward_and_loss_are_bitwise_unchanged(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    batch = random_batch(0)
    plain = model(**batch)
    controller = GateController(model, discover_gates(model).require())
    controller.set_importance(ImportanceOptions(mask_gradient_to_a=True))
    controller.set_step_scale(StepScaleOptions())
    controller.attach([torch.optim.SGD(model.parameters(), lr=0.1)])
    controller.meter.enabled = True
    watched = model(**batch)
    assert torch.equal(plain.logits, watched.logits)
    assert torch.equal(plain.loss, watched.loss)
    controller.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(
    make_peft_model: Callable[..., PeftModel], use_reentrant: bool
) -> None:
    plain, checkpointed = make_peft_model(), make_peft_model()
    enable_checkpointing(checkpointed, use_reentrant)
    options = ImportanceOptions(warmup_steps=0, refresh_every=1)
    _, first = train(plain, 3, importance=options, scale=StepScaleOptions())
    _, second = train(checkpointed, 3, importance=options, scale=StepScaleOptions())
    assert first is not None
    assert second is not None
    assert torch.equal(first.importance.importance, second.importance.importance)  # type: ignore[union-attr]
    assert torch.equal(first.weights, second.weights)
    expected = state(plain)
    assert all(torch.equal(value, expected[name]) for name, value in state(checkpointed).items())


def test_a_model_checkpointed_as_a_whole_is_counted_once(make_peft_model: Callable[..., PeftModel]) -> None:
    found = []
    for checkpointed in (False, True):
        model = make_peft_model()
        controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
        importance = controller.set_importance(ImportanceOptions(warmup_steps=0))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        controller.attach([optimizer])
        controller.meter.enabled = True

        def loss(model: PeftModel = model) -> Tensor:
            return model(**random_batch(0)).loss

        (checkpoint(loss, use_reentrant=False) if checkpointed else loss()).backward()
        assert controller.observer.forward_passes == 1
        optimizer.step()
        assert controller.misalignment is not None
        found.append((importance.responsiveness, controller.misalignment[0]))
        controller.detach()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_evaluation_passes_are_not_counted(make_peft_model: Callable[..., PeftModel]) -> None:
    options = ImportanceOptions(warmup_steps=0, refresh_every=1)
    plain, interrupted = make_peft_model(), make_peft_model()

    def evaluate(step: int) -> None:
        with torch.no_grad():
            interrupted(**random_batch(step + 1000))
        interrupted.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)

    _, first = train(plain, 3, importance=options)
    _, second = train(interrupted, 3, importance=options, on_step=evaluate)
    assert first is not None
    assert second is not None
    assert torch.equal(first.importance.importance, second.importance.importance)  # type: ignore[union-attr]


def test_a_skipped_step_counts_nothing(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    importance = controller.set_importance(ImportanceOptions(warmup_steps=0, refresh_every=1))
    controller.attach([optimizer])
    model(**random_batch(0)).loss.backward()
    controller.discard_unstepped()
    assert importance.steps == 0
    optimizer.zero_grad()
    model(**random_batch(1)).loss.backward()
    optimizer.step()
    controller.discard_unstepped()
    found = importance.responsiveness.clone()
    controller.detach()

    twin = make_peft_model()
    _, expected = train(twin, 0, importance=ImportanceOptions(warmup_steps=0, refresh_every=1))
    assert expected is not None
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    expected.attach([optimizer])
    twin(**random_batch(1)).loss.backward()
    optimizer.step()
    assert torch.equal(found, expected.importance.responsiveness)  # type: ignore[union-attr]


def test_masked_gradient_to_a_is_the_gradient_of_the_kept_channels(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    controller.set_importance(ImportanceOptions(keep_fraction=0.4, warmup_steps=0, mask_gradient_to_a=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    model(**random_batch(0)).loss.backward()
    unmasked = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    model(**random_batch(0)).loss.backward()
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.equal(parameter.grad, unmasked[name]):
            changed.append(name)
    assert changed == [f"base_model.model.{site.lora_layer_name}.lora_A.default.weight" for site in controller.gates]

    masked = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parts = controller.weights.split([site.channels for site in controller.gates])
    for site, weights in zip(controller.gates, parts, strict=True):
        cotangents: list[Tensor] = []
        inputs: list[Tensor] = []
        matrix_a, matrix_b = (getattr(site.lora_layer, name)["default"] for name in ("lora_A", "lora_B"))
        found = masked[f"base_model.model.{site.lora_layer_name}.lora_A.default.weight"]
        keep = matrix_b.register_full_backward_hook(lambda m, gi, go, to=cotangents: to.append(go[0].detach()))
        keep_input = matrix_a.register_forward_pre_hook(lambda m, args, to=inputs: to.append(args[0].detach()))
        model(**random_batch(0)).loss.backward()
        by_hand = ((cotangents[0] * weights) @ matrix_b.weight).flatten(0, 1).T @ inputs[0].flatten(0, 1)
        assert torch.allclose(found, by_hand, atol=1e-6)
        keep.remove()
        keep_input.remove()


def test_misalignment_splits_the_change_exactly(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    kept: dict[str, list[Tensor]] = {}
    gates = discover_gates(model).require()
    controller = GateController(model, gates, ALL_TOKENS)
    controller.set_importance(ImportanceOptions())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    controller.meter.enabled = True
    batch = random_batch(3)
    real = batch["attention_mask"].bool()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, *output: kept.setdefault(name, []).append(args[0].detach()[real].double())

    handles = [s.source.module.register_forward_pre_hook(keep(f"{s.name}/z")) for s in gates]
    handles += [s.output_layer.register_forward_pre_hook(keep(f"{s.name}/h")) for s in gates]  # type: ignore[union-attr]
    handles += [s.lora_layer.register_forward_pre_hook(keep(f"{s.name}/x")) for s in gates]
    model(**batch).loss.backward()
    optimizer.step()
    assert controller.misalignment is not None
    moved, squared_norms = controller.misalignment
    for index, site in enumerate(gates):
        z, h, x = (kept[f"{site.name}/{part}"][0] for part in "zhx")
        lora_a, lora_b = (getattr(site.lora_layer, n)["default"].weight.double() for n in ("lora_A", "lora_B"))
        delta = 2.0 * x @ lora_a.T @ lora_b.T
        before, after = (site.activation.evaluate(v).selection for v in (z - delta, z))
        assert moved[index].item() == pytest.approx((after - before).abs().mean().item(), rel=1e-4)
        other = h / (z * after) if site.kind == "gated" else torch.ones_like(h)
        feature, selected = before * delta * other, (after - before) * z * other
        whole = (z * after - (z - delta) * before) * other
        assert torch.allclose(feature + selected, whole, atol=1e-6)
        expected = [feature.square().sum().item(), selected.square().sum().item()]
        assert squared_norms[:, index].tolist() == pytest.approx(expected, rel=1e-3)
    for handle in handles:
        handle.remove()


def test_token_sampling_is_bounded_and_close(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    gates = discover_gates(model).require()
    batch = random_batch(0, batch=16, length=32, padded=False)
    found = []
    for limit in (None, 128):
        controller = GateController(model, gates, ObserverOptions(max_tokens=limit))
        importance = controller.set_importance(ImportanceOptions())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller.attach([optimizer])
        looked_at: list[int] = []
        controller.observer.listen(lambda index, site, z, weight, to=looked_at: to.append(len(z)))
        model(**batch)
        assert looked_at == [limit or 16 * 32] * 2
        # The sample stands for all tokens of the pass.
        assert controller.observer._tokens.tolist() == [16.0 * 32] * 2  # type: ignore[union-attr]
        optimizer.step()
        controller.detach()
        found.append(importance.responsiveness.clone())
    assert torch.allclose(found[0], found[1], rtol=0.2)


def test_prompt_tokens_can_be_left_out(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    gates = discover_gates(model).require()
    controller = GateController(model, gates, ObserverOptions(max_tokens=None, exclude_prompt=True))
    controller.set_importance(ImportanceOptions())
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    batch = random_batch(0, padded=False)
    batch["labels"][:, :4] = -100
    model(**batch)
    # Labels 4, 5 and 6 are targets; positions 3, 4 and 5 predict them.
    assert controller.observer._tokens.tolist() == [9.0, 9.0]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="needs labels"):
        model(input_ids=batch["input_ids"])


def test_a_mask_that_cannot_be_matched_is_refused(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    controller = GateController(model, discover_gates(model).require())
    controller.set_importance(ImportanceOptions())
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    four_dimensional = torch.zeros(1, 1, 3, 3)
    with pytest.raises(DataError, match=r"attention mask has shape \(1, 1, 3, 3\)"):
        model(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=four_dimensional)
    # Two cached positions before three new ones: the mask is longer than the tokens.
    cache = model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values
    mask = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(DataError, match=r"padding mask of shape \(1, 5\) cannot be matched"):
        model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask, past_key_values=cache)


def test_a_shared_activation_module_is_observed_call_by_call() -> None:
    def model(shared: bool) -> PeftModel:
        llama = tiny_llama()
        if shared:
            llama.model.layers[1].mlp.act_fn = llama.model.layers[0].mlp.act_fn
        return with_lora(llama, LLAMA_TARGETS)

    options = ImportanceOptions(warmup_steps=0, refresh_every=1)
    own, shared = model(False), model(True)
    scale = StepScaleOptions(granularity="site", normalize=False)
    _, first = train(own, 4, importance=options, scale=scale)
    _, second = train(shared, 4, importance=options, scale=scale)
    assert first is not None
    assert second is not None
    assert torch.equal(first.weights, second.weights)
    expected = state(own)
    assert all(torch.equal(value, expected[name]) for name, value in state(shared).items())


def test_silent_sites_are_an_error_that_names_them(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    gates = discover_gates(model).require()
    for allow in (False, True):
        controller = GateController(model, gates, ObserverOptions(allow_silent_sites=allow))
        controller.set_importance(ImportanceOptions(warmup_steps=0))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        controller.attach([optimizer])
        # As a fused kernel would: the activation module is no longer called.
        bypassed = gates.sites[0].source.module
        bypassed._forward_pre_hooks.clear()
        model(**random_batch(0)).loss.backward()
        if allow:
            optimizer.step()
            assert bool((controller.weights[: gates.sites[0].channels] == 1).all())
        else:
            with pytest.raises(DiscoveryError, match=f"the gates {gates.sites[0].name} saw no token"):
                optimizer.step()
        controller.detach()
        assert not bypassed._forward_pre_hooks


def test_unreachable_rows_are_refused(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    gates = discover_gates(model).require()
    controller = GateController(model, gates)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ConfigurationError, match="no mechanism is set"):
        controller.attach([torch.optim.SGD(parameters, lr=0.1)])
    controller.set_importance(ImportanceOptions())
    with pytest.raises(ConfigurationError, match="set twice"):
        controller.set_importance(ImportanceOptions())
    rows = [site.parameters()[0].parameter for site in gates]
    others = [p for p in parameters if all(p is not r for r in rows)]
    with pytest.raises(UpdateError, match=r"no optimizer holds .*lora_B\.default\.weight"):
        controller.attach([torch.optim.SGD(others, lr=0.1)])
    with pytest.raises(UpdateError, match="spread over 2 optimizers"):
        controller.attach([torch.optim.SGD(rows[:1], lr=0.1), torch.optim.SGD(rows[1:], lr=0.1)])
    rows[0].requires_grad_(False)
    with pytest.raises(UpdateError, match="has no trainable parameter"):
        gates.sites[0].parameters()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_steps_do_not_wait_for_the_device(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model().cuda()
    controller = GateController(model, discover_gates(model).require())
    controller.set_importance(ImportanceOptions(warmup_steps=0, refresh_every=1))
    controller.set_step_scale(StepScaleOptions(granularity="channel", normalize=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller.attach([optimizer])
    batches = [{name: value.cuda() for name, value in random_batch(step).items()} for step in range(3)]
    for step, batch in enumerate(batches):
        model(**batch).loss.backward()
        # The first step checks once that every site fired.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    controller.detach()
