"""Training of the last blocks alone, on inputs that are computed once for each record and kept on disk.

What the last k blocks are given does not depend on LoRA in them. The blocks before them so run once for each record; in
later passes the first ones hand on what they are given, and the last of them hands in what was kept. Losses are those
of training without the cache to rounding, as a record meets other ones, and other padding, in each batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from na_lora_lightning.errors import ConfigurationError


class BlockInputs:
    """Keeps the inputs of the last blocks of decoders.

    Args:
        folder: Where they are kept; a name in it depends on the model and the number of blocks.
        last_layers: k, the number of blocks that train.
        model: What tells the model from others.
    """

    def __init__(self, folder: Path, last_layers: int, model: str) -> None:
        self.last_layers = last_layers
        self._folder = folder / hashlib.sha256(f"{model}:{last_layers}".encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

    def attach(self, model: nn.Module) -> None:
        """Has the blocks of a model before the last ones run once for each record.

        Raises:
            ConfigurationError: It has no one list of blocks, or not more than are to train.
        """
        depth = getattr(model.config, "num_hidden_layers", None)
        lists = [
            (parent, child)
            for parent in model.modules()
            for child in parent.children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ]
        if len(lists) != 1 or not 0 < self.last_layers < (depth or 0):
            reason = f"has {depth} blocks" if len(lists) == 1 else "does not say which its blocks are"
            raise ConfigurationError(
                f"{type(model).__name__} {reason}, so that the inputs of the last {self.last_layers} cannot be kept; "
                "give another --last-layers, or leave it out."
            )
        parent, blocks = lists[0]
        _Feeder(self, parent, list(blocks)[: -self.last_layers])

    def read(self, ids: list[int]) -> Tensor | None:
        """The inputs of a record, ``[length, width]``, or None."""
        path = self._path(ids)
        return load_file(path)["inputs"] if path.is_file() else None

    def write(self, ids: list[int], inputs: Tensor) -> None:
        """Keeps them."""
        path = self._path(ids)
        partial = path.with_name(f"{path.name}.{id(inputs)}.partial")
        save_file({"inputs": inputs.contiguous().cpu()}, partial)
        partial.replace(path)

    def _path(self, ids: list[int]) -> Path:
        return self._folder / f"{hashlib.sha256(str(ids).encode()).hexdigest()[:32]}.safetensors"


class _Feeder:
    """Stands in for the first blocks of one model."""

    def __init__(self, kept: BlockInputs, parent: nn.Module, blocks: list[nn.Module]) -> None:
        self._kept = kept
        self._rows: list[list[int]] | None = None
        self._mask: Tensor | None = None
        self._found: Tensor | None = None
        parent.register_forward_pre_hook(self._begin, with_kwargs=True)
        for block in blocks:
            block.forward = self._instead(block.forward, block is blocks[-1])

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        self._rows = self._mask = self._found = None
        # Packed records, images and generation run through all blocks.
        if kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None:
            return
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return
        self._mask = mask.bool()
        self._rows = [row[real].tolist() for row, real in zip(ids, self._mask, strict=True)]
        found = [self._kept.read(row) for row in self._rows]
        if all(each is not None for each in found):
            first = found[0]
            assert first is not None
            whole = first.new_zeros(*ids.shape, first.shape[-1])
            whole[self._mask.cpu()] = torch.cat(found)  # type: ignore[arg-type]
            self._found = whole.to(ids.device)

    def _instead(self, forward: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._found is not None:
                return self._found.to(hidden_states.dtype) if is_last else hidden_states
            with torch.no_grad():
                output = forward(hidden_states, *args, **kwargs)
            if is_last and self._rows is not None and isinstance(output, Tensor):
                assert self._mask is not None
                for row, real, inputs in zip(self._rows, self._mask, output, strict=True):
                    self._kept.write(row, inputs[real])
            return output

        return run
