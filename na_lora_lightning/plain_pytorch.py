"""Both mechanisms in a training loop of one's own; needs nothing but PyTorch and a model with PEFT's LoRA layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.lora_layers import require_lora
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.stepping.optimizers import stepping_optimizer
from na_lora_lightning.errors import ConfigurationError, UpdateError
from na_lora_lightning.gate_history import GateHistory

# By class name, so that nothing has to be imported or installed to recognise them.
_REFUSED = {
    "FullyShardedDataParallel": "flattens the LoRA parameters of a module into one; use fully_shard (FSDP2) or "
    "DistributedDataParallel",
    "DeepSpeedEngine": "steps copies of the LoRA parameters; use DistributedDataParallel",
    "DataParallel": "runs copies of the model in threads, whose gates are not seen; use DistributedDataParallel",
}


@contextmanager
def nonlinearity_aware(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    importance: ImportanceOptions | None = ImportanceOptions(),
    step_scale: StepScaleOptions | None = StepScaleOptions(),
    observer: ObserverOptions = ObserverOptions(),
    example_inputs: Mapping[str, Any] | None = None,
    allow_unmasked_gates: bool = False,
    measure_every: int = 10,
    total_steps: int | None = None,
    reduce: Callable[[Tensor], None] | None = None,
    history: str | os.PathLike[str] | None = None,
) -> Iterator[GateController]:
    """Trains nonlinearity-aware inside of a ``with`` block, and takes every hook off at its end, whatever happens.

    Write the loop as usual. Statistics come from the forward passes that are run with gradients, so evaluate under
    ``torch.no_grad()``; the updates are corrected in the optimizer's own ``step``, so accumulation, clipping,
    schedulers and closures need nothing. A step that a ``GradScaler`` skips counts for nothing, which is seen from its
    gradients: they are cleared though no step was taken.

    Args:
        model: The PEFT model, on its final device; also inside of ``DistributedDataParallel`` or ``torch.compile``, or
            any module that holds PEFT's LoRA layers and is called itself.
        optimizer: The optimizer that steps, or several of which one holds all LoRA rows of the gates; also wrapped by
            accelerate.
        importance: Options of the temporal-importance mask; None leaves it out.
        step_scale: Options of the step scale; None leaves it out.
        observer: What the statistics look at. With ``exclude_prompt`` and a model that is called without labels, set
            ``controller.observer.labels`` before each call.
        example_inputs: Keyword arguments of one small forward pass, for models that take more than text.
        allow_unmasked_gates: Accept that some gates have no LoRA instead of stopping with their names.
        measure_every: Optimizer steps between two measurements of selection misalignment, which
            ``controller.metrics()`` shows right after them; 0 for none.
        total_steps: Optimizer steps of the whole training, those before a resume included, where that is known: a
            mask that would come later is then warned of in the beginning, and not at the end alone.
        reduce: Adds a tensor over all processes in place; by default over all of ``torch.distributed``, where that is
            initialised.

        history: Folder to which measured steps are written as ``history.jsonl``, for ``na-lora report``; with them the
            numbers in ``controller.notes``, such as ``controller.notes["loss"] = loss.item()``.

    Yields:
        The controller: ``metrics()``, a dictionary of floats by the tags that TensorBoard shows under Lightning, and
        ``state_dict()`` and ``load_state_dict()`` for checkpoints.

    Raises:
        ConfigurationError: Options do not fit the gates, or both mechanisms are left out.
        DiscoveryError: No gate was found, or one has no LoRA.
        UpdateError: The optimizer does not hold the gates' rows, or what wraps the model keeps the update out of reach.

    Example::

        with nonlinearity_aware(peft_model, optimizer) as controller:
            for batch in batches:
                peft_model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(controller.metrics()["gates/selection_misalignment"])
    """
    if measure_every < 0:
        raise ConfigurationError(
            f"measure_every is {measure_every}, and it counts optimizer steps; give 0 for no measurement or a positive "
            "number."
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    controller = attached_controller(
        model,
        optimizers,
        importance=importance,
        step_scale=step_scale,
        observer=observer,
        example_inputs=example_inputs,
        allow_unmasked_gates=allow_unmasked_gates,
        reduce=reduce,
    )

    controller.total_steps = total_steps

    kept = None if history is None or not _is_first_process() else GateHistory(history, controller)

    def decide_to_measure(*_: Any) -> None:
        if kept is not None and controller.steps > 0:
            kept.start(controller.steps - 1, total_steps)
            if controller.meter.enabled:
                kept.step(controller.steps, controller.notes)
        controller.meter.enabled = measure_every > 0 and (controller.steps + 1) % measure_every == 0

    controller.meter.enabled = measure_every == 1
    handles = [stepping_optimizer(each).register_step_post_hook(decide_to_measure) for each in optimizers]
    steps_before = controller.steps
    try:
        yield controller
        if controller.gradients.backward_passes and controller.steps == steps_before:
            warnings.warn(
                "the optimizer that was given to nonlinearity_aware took no step, so whatever was trained was trained "
                "as plain LoRA; give it the optimizer that steps.",
                stacklevel=3,
            )
        controller.conclude()
        if kept is not None:
            kept.end(controller.steps)
    finally:
        for handle in handles:
            handle.remove()
        controller.detach()


def attached_controller(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    importance: ImportanceOptions | None,
    step_scale: StepScaleOptions | None,
    observer: ObserverOptions,
    example_inputs: Mapping[str, Any] | None,
    allow_unmasked_gates: bool,
    reduce: Callable[[Tensor], None] | None = None,
) -> GateController:
    """A controller whose hooks are on the model and the optimizer; see :func:`nonlinearity_aware` for its arguments.

    Whoever calls it has to call ``detach()``.
    """
    if importance is None and step_scale is None:
        raise ConfigurationError(
            "importance and step_scale are both None, so training would be plain LoRA; give the options of one of them."
        )
    model = _unwrapped(model)
    for each in optimizers:
        if type(each).__module__.partition(".")[0] == "deepspeed":
            raise UpdateError(
                f"{type(each).__name__} (DeepSpeed) steps copies of the LoRA parameters, so the update of a gate's "
                "rows cannot be reached; use DistributedDataParallel."
            )
    gates = discover_gates(model, example_inputs).require(allow_unmasked_gates)
    controller = GateController(model, gates, observer, reduce or _reduce_over_processes())
    if importance is not None:
        controller.set_importance(importance)
    if step_scale is not None:
        controller.set_step_scale(step_scale)
    controller.attach(optimizers)
    return controller


def _unwrapped(model: nn.Module) -> nn.Module:
    """The PEFT model, or the module with LoRA layers, inside of what it is wrapped in for training."""
    require_lora(model)
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise UpdateError(
                    f"{kind.__name__} {_REFUSED[kind.__name__].replace('; ', ', so gates cannot be masked; ')}."
                )
    while not hasattr(model, "get_base_model"):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _reduce_over_processes() -> Callable[[Tensor], None] | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None

    def reduce(tensor: Tensor) -> None:
        distributed.all_reduce(tensor)

    return reduce
