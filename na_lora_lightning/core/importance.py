"""Where :class:`ImportanceOptions` was; ``from na_lora_lightning import ImportanceOptions`` is its address."""

from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions

__all__ = ["ImportanceOptions"]
