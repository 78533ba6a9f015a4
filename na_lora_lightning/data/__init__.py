"""Instruction data, with and without images: loading, tokenising, batching and exact resumption."""

from na_lora_lightning.data.datamodule import InstructionDataModule
from na_lora_lightning.data.splits import SplitSummary, TruncationWarning
from na_lora_lightning.data.vision import LeftOutRecordsWarning, VisionInstructionDataModule

__all__ = [
    "InstructionDataModule",
    "LeftOutRecordsWarning",
    "SplitSummary",
    "TruncationWarning",
    "VisionInstructionDataModule",
]
