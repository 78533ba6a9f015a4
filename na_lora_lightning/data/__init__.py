"""Instruction data: loading, tokenising, batching and exact resumption."""

from na_lora_lightning.data.datamodule import InstructionDataModule
from na_lora_lightning.data.splits import SplitSummary, TruncationWarning

__all__ = ["InstructionDataModule", "SplitSummary", "TruncationWarning"]
