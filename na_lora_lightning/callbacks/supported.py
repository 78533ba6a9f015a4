"""What depends on how Lightning runs a fit: its strategy, its closures, its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.errors import ConfigurationError, UpdateError
from na_lora_lightning.lightning_internals import averages_between_processes

# By name, because the classes of ``lightning`` and ``pytorch_lightning`` differ. The first that fits counts: Lightning
# derives DeepSpeed and XLA from the strategies that work.
_REFUSED = {
    "DeepSpeedStrategy": "steps float32 copies in an engine of its own and not the model's LoRA parameters",
    "FSDPStrategy": "flattens parameters into one, of which a process may hold a part of a row",
    "XLAStrategy": "runs steps on XLA devices, where the mechanisms were never tried",
    "SingleDeviceXLAStrategy": "runs steps on XLA devices, where the mechanisms were never tried",
}
_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_REMEDY = "use strategy='ddp', or ModelParallelStrategy with fully_shard() where the model does not fit on a device"


def require_supported_strategy(trainer: Trainer) -> None:
    """Checks that the optimizer of this strategy steps the model's own LoRA parameters; before the model is loaded.

    Raises:
        UpdateError: It does not, or whether it does is not known.
    """
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    names = [kind.__name__ for kind in type(strategy).__mro__]
    reason = next((_REFUSED[kind] for kind in names if kind in _REFUSED), None)
    if reason is None and not any(kind in _SUPPORTED for kind in names):
        reason = "is not known, so whether its optimizer steps the model's LoRA parameters is not either"
    if reason is not None:
        raise UpdateError(
            f"the strategy {name} {reason}, so the update of a gate's rows cannot be masked; {_REMEDY}, or train "
            "without the NA-LoRA callbacks."
        )


def require_reachable_rows(trainer: Trainer) -> None:
    """Checks that all processes train one model whose gates' rows can be told; after the model was sharded.

    Raises:
        UpdateError: They do not, or the model is sharded in a way that does not work.
    """
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    if averages_between_processes(strategy):
        raise UpdateError(
            f"the strategy {name} averages weights over processes from time to time (post-local SGD), so they train "
            "different models in between, which one mask does not fit; leave model_averaging_period out."
        )
    if any(kind.__name__ == "ModelParallelStrategy" for kind in type(strategy).__mro__):
        _require_sharded_by_rows(trainer, name)


def _require_sharded_by_rows(trainer: Trainer, strategy_name: str) -> None:
    strategy: Any = trainer.strategy
    mesh = strategy.device_mesh
    data, tensor = (mesh[name].size() for name in ("data_parallel", "tensor_parallel"))
    if tensor > 1:
        raise UpdateError(
            f"{strategy_name} splits layers over {tensor} devices (tensor_parallel_size), so a process sees some "
            f"channels of the gates alone; set data_parallel_size={data * tensor} and tensor_parallel_size=1, and call "
            'fully_shard() with the mesh "data_parallel".'
        )
    module = trainer.lightning_module
    model = find_peft_model(module)
    around = [unit for unit in Shards(module).around(model) if unit is not model]
    if around:
        raise UpdateError(
            f"fully_shard() was called on {type(around[0]).__name__}, around the PEFT model, so that cannot be run "
            "alone to find its gates; call it on the PEFT model instead, in configure_model()."
        )
    if data > 1 and not Shards(model):
        raise UpdateError(
            f"under {strategy_name} nothing averages gradients over processes but fully_shard(), which "
            f"{type(module).__name__} has not called on its PEFT model; call it in configure_model(), or use "
            "strategy='ddp'."
        )


def reduce_over_processes(trainer: Trainer) -> Callable[[Tensor], None] | None:
    """A function that adds a tensor over all processes in place, or None for one process."""
    if trainer.world_size == 1:
        return None
    device = trainer.strategy.root_device

    def reduce(tensor: Tensor) -> None:
        # Parameters may be kept on the CPU, whose tensors the processes of GPUs cannot add.
        sums = tensor.to(device)
        torch.distributed.all_reduce(sums)
        if sums is not tensor:
            tensor.copy_(sums)

    return reduce


def is_true_in_any_process(trainer: Trainer, value: bool) -> bool:
    """Whether ``value`` is true in one process at least; all of them have to call this."""
    reduce = reduce_over_processes(trainer)
    if reduce is None:
        return value
    count = torch.tensor(float(value))
    reduce(count)
    return bool(count)


def require_whole_closure(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
    """Checks that an optimizer which evaluates its closure several times sees the whole step in it.

    Raises:
        ConfigurationError: LBFGS steps after several micro-batches, the last of which alone is in its closure.
    """
    several = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
    if several and isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates its closure several times, and with accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches} Lightning adds the last micro-batch's gradient each time; set "
            "accumulate_grad_batches to 1 and make batches larger."
        )


def probing_precision(trainer: Trainer) -> AbstractContextManager[None]:
    """The autocast of a mixed precision, without which a model of several dtypes may not run at all.

    The other precisions have converted the model by then. Their context changes the dtype of new tensors, in which
    activations could not be told apart.
    """
    is_mixed = str(trainer.precision).endswith("-mixed")
    context: AbstractContextManager[None] = trainer.precision_plugin.forward_context() if is_mixed else nullcontext()
    return context


def in_training_dtype(trainer: Trainer, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Example inputs as the trainer converts batches: floating ones to the dtype of "bf16-true", say."""
    converted: Mapping[str, Any] = trainer.precision_plugin.convert_input(dict(inputs))
    return converted
