"""The ready-made module under ``ModelParallelStrategy``: its model is sharded over processes with FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import saves_distributed_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from peft import PeftModel


def shards_model(trainer: Trainer) -> bool:
    """Whether the trainer's strategy leaves it to the module to shard its model."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def require_shardable(trainer: Trainer, generates: bool, quantized: bool = False) -> None:
    """Checks, before the model is loaded, what does not work where it is sharded.

    Args:
        trainer: Under any strategy, with its processes at hand.
        generates: Whether text is to be generated.
        quantized: Whether the base weights are quantised.

    Raises:
        ConfigurationError: Something does not.
    """
    if not shards_model(trainer):
        return
    strategy: Any = trainer.strategy
    data, tensor = (strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel"))
    if tensor > 1:
        raise ConfigurationError(
            f"trainer.strategy has tensor_parallel_size={tensor}, and the model is sharded without tensor parallelism; "
            f"set data_parallel_size={data * tensor} and tensor_parallel_size=1."
        )
    if saves_distributed_checkpoint(strategy):
        raise ConfigurationError(
            "trainer.strategy has save_distributed_checkpoint=True, and such a checkpoint cannot be loaded without the "
            "base model, which is left out of it; set it to False."
        )
    if quantized:
        raise ConfigurationError(
            "quantised weights are not sharded here; leave model.quantization out, or use one device or strategy='ddp'."
        )
    if generates:
        raise ConfigurationError(
            "text cannot be generated where the model is sharded, as processes end their answers at different moments; "
            "set model.evaluation.generate to false, and predict with one device or strategy='ddp'."
        )


def shard_model(model: PeftModel, trainer: Trainer) -> None:
    """Calls ``fully_shard`` on each block of a model and on the whole, where the strategy asks for it.

    Args:
        model: The PEFT model with all its weights, on the CPU; each process keeps its share on its device. Base
            weights and adapters may differ in dtype.
        trainer: Its strategy has the mesh of the processes.
    """
    if not shards_model(trainer):
        return
    from torch.distributed.fsdp import fully_shard

    strategy: Any = trainer.strategy
    mesh = strategy.device_mesh["data_parallel"]
    base: Any = model.get_base_model()
    # What transformers never splits over devices is what is used at once.
    blocks = set(getattr(base, "_no_split_modules", None) or ())
    for module in reversed([module for module in base.modules() if type(module).__name__ in blocks]):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
