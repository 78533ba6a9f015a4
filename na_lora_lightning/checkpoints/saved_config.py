"""The configuration of a run, in the run's own folder."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from na_lora_lightning.checkpoints.run_folder import free_path, run_folder


class RunConfigCallback(SaveConfigCallback):
    """Writes ``config.yaml`` as Lightning does, but never over that of another run.

    A fit has a folder of its own, or goes on in it; where a validation, test or prediction shares one, its
    configuration gets a number.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file."""
        if self.already_saved:
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            path = path if stage == "fit" else free_path(path)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True
