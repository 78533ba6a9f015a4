"""Finds gates: the activations of a model, and the rows of ``lora_B`` that feed them."""

from na_lora_lightning.core.discovery.gates import discover_gates

__all__ = ["discover_gates"]
