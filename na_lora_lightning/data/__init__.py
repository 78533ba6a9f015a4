"""Instruction data, with and without images: loading, tokenising, batching and exact resumption."""

from na_lora_lightning.data.images.datamodule import VisionInstructionDataModule
from na_lora_lightning.data.text.datamodule import InstructionDataModule
from na_lora_lightning.data.text.splits import LeftOutRecordsWarning, SplitSummary, TruncationWarning

__all__ = [
    "InstructionDataModule",
    "LeftOutRecordsWarning",
    "SplitSummary",
    "TruncationWarning",
    "VisionInstructionDataModule",
]
