"""Loggers and optimizers of packages that are not installed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch import nn
from torch.optim import Optimizer


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

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures that it was given."""
        return self.__dict__.setdefault("_pictures", [])

    def log_image(self, key: str, images: list[Any], step: int | None = None, **keywords: Any) -> None:
        """Takes them."""
        assert all(image.mode == "RGB" for image in images)
        self.pictures.append(key)


class OfflineMLFlow(MLFlowLogger):
    """Asks a server for the number of its experiment, and a new run for its version."""

    def __init__(self, save_dir: str, tracking_uri: str | None = None, run_id: str | None = None) -> None:
        Logger.__init__(self)
        self._tracking_uri = tracking_uri or f"file:{save_dir}"
        self._experiment_name, self._experiment_id = "lightning_logs", None
        self._run_id, self._initialized = run_id, False
        self._log_model, self._checkpoint_callback = False, None
        self._server = Path(save_dir) / "server.json"
        self.pictures: list[str] = []
        self._mlflow_client: Any = SimpleNamespace(get_experiment_by_name=self._find, log_image=self._take_picture)

    def _take_picture(self, run_id: str, image: Any, artifact_file: str) -> None:
        assert run_id == self.run_id
        assert image.mode == "RGB"
        self.pictures.append(artifact_file)

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


class Lion(Optimizer):
    """Signs of an interpolated momentum: no second moment, every entry moves by lr."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(torch.lerp(parameter.grad, momentum, 0.9).sign(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 0.01)
        return loss


class Averaging(torch.optim.SGD):
    """Keeps averaged weights beside the parameters, as a schedule-free optimizer does, where nobody knows."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class ScheduleFree(torch.optim.SGD):
    """SGD by Defazio et al.: the parameter is y in training and x in evaluation, z is in the state."""

    averaged = 0
    in_training = True

    @torch.no_grad()
    def _extrapolate(self, weight: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            if "z" in self.state[parameter]:
                parameter.lerp_(self.state[parameter]["z"], weight)

    def train(self) -> None:
        if not self.in_training:
            self._extrapolate(0.1)
        self.in_training = True

    def eval(self) -> None:
        if self.in_training:
            self._extrapolate(1 - 1 / 0.9)
        self.in_training = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.averaged += 1
        weight, lr = 1 / self.averaged, self.param_groups[0]["lr"]
        for parameter in self.param_groups[0]["params"]:
            z = self.state[parameter].setdefault("z", parameter.clone())
            gradient = parameter.grad + 0.1 * parameter
            parameter.lerp_(z, weight)
            parameter.add_(gradient, alpha=lr * (0.9 * (1 - weight) - 1))
            z.sub_(gradient, alpha=lr)
        return loss
