"""Where :func:`keep_inputs_uncast` was; ``from na_lora_lightning import keep_inputs_uncast`` is its address."""

from na_lora_lightning.models.lora_inputs import keep_inputs_uncast

__all__ = ["keep_inputs_uncast"]
