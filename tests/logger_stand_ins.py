"""Loggers whose services are made up; they name folders and runs as wandb 0.31 and mlflow 3.17 were seen to do."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment


class OfflineWandb(WandbLogger):
    """Has no version before its run begins, and begins the run of an id that it is given again."""

    def __init__(self, save_dir: str = ".", project: str = "lightning_logs", id: str | None = None) -> None:
        Logger.__init__(self)
        self._save_dir, self._project, self._id = save_dir, project, id
        self._wandb_init = {"dir": save_dir, "project": project, "id": id, "resume": "allow"}
        self._experiment: Any = None
        self._log_model = False
        self._checkpoint_callbacks = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = SimpleNamespace(id=self._wandb_init["id"] or uuid.uuid4().hex[:8])
            (Path(self._save_dir) / "wandb" / f"offline-run-{os.getpid()}-{self._experiment.id}").mkdir(parents=True)
        return self._experiment

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Takes them."""

    def log_metrics(self, *arguments: Any, **keywords: Any) -> None:
        """Takes them."""


class OfflineMLFlow(MLFlowLogger):
    """Asks a server for the number of its experiment, and a new run for its version."""

    def __init__(self, save_dir: str, tracking_uri: str | None = None, run_id: str | None = None) -> None:
        Logger.__init__(self)
        self._tracking_uri = tracking_uri or f"file:{save_dir}"
        self._experiment_name, self._experiment_id = "lightning_logs", None
        self._run_id, self._initialized = run_id, False
        self._log_model, self._checkpoint_callback = False, None
        self._server = Path(save_dir) / "server.json"
        self._mlflow_client: Any = SimpleNamespace(get_experiment_by_name=self._find)

    def _find(self, name: str) -> Any:
        found = json.loads(self._server.read_text()) if self._server.exists() else {}
        return SimpleNamespace(experiment_id=found[name]) if name in found else None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if not self._initialized:
            self._initialized = True
            self._server.parent.mkdir(parents=True, exist_ok=True)
            self._server.write_text(json.dumps({"lightning_logs": "903393539301851748"}))
            self._experiment_id = "903393539301851748"
            self._run_id = self._run_id or uuid.uuid4().hex
        return self._mlflow_client

    log_hyperparams = log_metrics = OfflineWandb.log_metrics

    def finalize(self, status: str = "success") -> None:
        """Has nothing to end."""


class Fleeting(Logger):
    """A logger of one's own that cannot be told which run to go on with."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder, self._version = save_dir, uuid.uuid4().hex[:6]

    @property
    def save_dir(self) -> str:
        return self._folder

    @property
    def name(self) -> str:
        return "fleeting"

    @property
    def version(self) -> str:
        return self._version

    log_hyperparams = log_metrics = OfflineWandb.log_metrics
