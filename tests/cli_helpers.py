"""A folder to run ``na-lora fit`` in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from module_helpers import saved_model, write_records

from na_lora_lightning.cli.main import main


class Fit:
    """A fit of four steps an epoch."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        records = write_records(folder / "records.jsonl", 16)
        self.options: dict[str, Any] = {
            "model": {"model_name_or_path": saved_model(folder / "base"), "lora": {"r": 2, "alpha": 4}},
            "data": {"train": records, "validation": records, "batch_size": 4},
            "trainer": {
                "accelerator": "cpu",
                "default_root_dir": str(folder / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
            },
        }

    def file(self, name: str, content: Any) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def __call__(self, *arguments: str) -> int:
        return main(["fit", "--config", self.file("run.yaml", self.options), *arguments])

    def error(self, *arguments: str) -> str:
        self._capsys.readouterr()
        assert self(*arguments) == 2
        (line,) = [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert not list(self.folder.glob("run/**/*.ckpt"))
        return line.removeprefix("error: ")

    @property
    def newest(self) -> Path:
        return max(self.folder.glob("run/**/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.newest, weights_only=True)  # type: ignore[no-any-return]

    @property
    def steps(self) -> int:
        return int(self.checkpoint["global_step"])
