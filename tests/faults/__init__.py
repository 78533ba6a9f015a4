"""Kills, full disks and long runs of ``na-lora fit``: ``make faults`` and ``make soak``."""
