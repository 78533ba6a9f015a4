"""What ``na-lora`` does when it is stopped or its files are damaged, and a few runs of the two fuzzers."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import SETTINGS, Setting, Workplace, differences, fit, last_run, remains
from fuzz.data_files import Figures, run
from fuzz.option_space import draw
from fuzz.options import fuzz
from module_helpers import Batches, quiet_trainer, some_batches

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.checkpoints import adapter_state as adapters
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.checkpoints.last_run import require_writable
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule, NoTargetTokensWarning

PLAIN = Setting("plain", ())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> Path:
    """The root folder of a run that came to its end."""
    run = workplace.folder / "finished"
    assert fit(workplace.arguments(run, PLAIN), workplace.folder / "log")[0] == 0
    return run


def send_at(number: int, which: int) -> Any:
    """Sends a signal to the run in its n-th training step."""

    def set_trap() -> None:
        # A suite that a shell runs in the background is started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        original, calls = NALoRALightningModule.training_step, 0

        def trapped(self: Any, batch: Any, batch_idx: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), which)
            return original(self, batch, batch_idx)

        NALoRALightningModule.training_step = trapped  # type: ignore[method-assign]

    return set_trap


def stopped(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith(("Stopped by", "error: "))]


def test_sigterm_ends_the_step_and_saves(workplace: Workplace, finished: Path, tmp_path: Path) -> None:
    rare = Setting("rare", ("--checkpoint.every_n_steps=0", "--trainer.accumulate_grad_batches=2"))
    arguments = workplace.arguments(tmp_path / "run", rare)
    # In the first of two micro-batches: Lightning by itself would stop between the two.
    status, _ = fit(arguments, tmp_path / "log", trap=send_at(3, signal.SIGTERM))
    assert status == 143
    path = tmp_path / "run" / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=2.ckpt"
    expected = f"Stopped by SIGTERM after 2 optimizer steps; resume with --ckpt_path last, which is {str(path)!r}."
    assert stopped(tmp_path / "log") == [expected]
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert fit([*arguments, "--ckpt_path=last"], tmp_path / "log")[0] == 0
    assert fit(workplace.arguments(tmp_path / "whole", rare), tmp_path / "log")[0] == 0
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "run")) == []


def slurm_of_one(folder: Path) -> dict[str, str]:
    """The environment of a job, with an ``scontrol`` that notes what it is given, and ends the job as SLURM does."""
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder / "asked"}\nkill -TERM $PPID\n')
    program.chmod(0o755)
    job = {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "here"}
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    return {**variables, "SLURM_JOB_NAME": "train", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.filterwarnings("ignore:The .srun. command is available")
def test_a_job_of_slurm_saves_at_the_end_of_a_step_and_is_queued_again(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = Setting("rare", ("--checkpoint.every_n_steps=0", "--trainer.accumulate_grad_batches=2"))
    for name, value in slurm_of_one(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    arguments = [*workplace.arguments(tmp_path / "run", rare), "--ckpt_path=last"]
    status, _ = fit(arguments, tmp_path / "log", trap=send_at(3, signal.SIGUSR1))
    assert status == 143
    log = (tmp_path / "log").read_text()
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 7\n"
    assert "SLURM asks job 7 to end: it is queued again after 2 optimizer steps." in log
    assert [path.name for path in (tmp_path / "run").rglob("*.ckpt")] == ["epoch=0-step=2.ckpt"]
    assert fit(arguments, tmp_path / "log")[0] == 0
    assert fit(workplace.arguments(tmp_path / "whole", rare), tmp_path / "log")[0] == 0
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "run")) == []


def test_an_interrupt_names_the_last_checkpoint(workplace: Workplace, tmp_path: Path) -> None:
    arguments = workplace.arguments(tmp_path / "run", SETTINGS[1])
    status, _ = fit(arguments, tmp_path / "log", trap=send_at(4, signal.SIGINT))
    assert status == 130
    (line,) = stopped(tmp_path / "log")
    assert line.startswith("Stopped by SIGINT after 3 optimizer steps; resume with --ckpt_path last")
    assert line.endswith("epoch=0-step=3.ckpt'.")


@pytest.mark.parametrize(("limit", "status"), [(60_000, 0), (12_000, 2)])
def test_files_that_cannot_be_written(workplace: Workplace, tmp_path: Path, limit: int, status: int) -> None:
    # Checkpoints are larger than both limits, the curves and pictures of TensorBoard too.
    logger = ["--trainer.logger=false"] if status == 0 else []

    def forbid() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    found, _ = fit(workplace.arguments(tmp_path / "run", PLAIN, *logger), tmp_path / "log", trap=forbid)
    log = (tmp_path / "log").read_text()
    assert found == status
    assert list((tmp_path / "run").rglob("*.ckpt")) == list((tmp_path / "run").rglob("*.partial")) == []
    assert "Traceback" not in log
    if status == 0:
        assert "could not be written (File too large), and training goes on without it" in log
        assert (last_run(tmp_path / "run") / "adapter" / "adapter_model.safetensors").is_file()
    else:
        (line,) = stopped(tmp_path / "log")
        assert line.startswith("error: writing logs failed after")
        assert line.endswith(
            "(File too large), so make room or choose another folder; there is no checkpoint yet, so begin again."
        )


def test_an_adapter_that_cannot_be_written(finished: Path, workplace: Workplace, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(last_run(run) / "adapter")
    arguments = workplace.arguments(run, PLAIN, "--ckpt_path=last")

    def fill_disk() -> None:
        def fail(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        adapters._take_place = fail

    assert fit(arguments, tmp_path / "log", trap=fill_disk)[0] == 2
    assert "error: the adapter could not be written to" in (tmp_path / "log").read_text()
    assert not list(run.rglob(".adapter.partial"))
    # The run had ended, and still its adapter is written.
    assert fit(arguments, tmp_path / "log")[0] == 0
    assert differences(remains(finished), remains(run)) == []


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    require_writable([tmp_path / "new" / "deeper"])
    with pytest.raises(
        ConfigurationError, match=r"file/runs' for logs and checkpoints cannot be written to, as .* a file"
    ):
        require_writable([tmp_path / "file" / "runs"])
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(ConfigurationError, match=r"is not allowed; set trainer\.default_root_dir"):
        require_writable([tmp_path / "new"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_last_run_is_validated_and_another_rank_refused(
    workplace: Workplace, finished: Path, tmp_path: Path
) -> None:
    common = workplace.arguments(finished, PLAIN, "--ckpt_path=last")[1:]
    assert fit(["validate", *common], tmp_path / "log")[0] == 0
    assert fit(["fit", *common, "--model.lora.r=4"], tmp_path / "other")[0] == 2
    assert stopped(tmp_path / "other") == [
        "error: the checkpoint was trained with lora.r=2 and the current model has 4; set lora as it was."
    ]
    assert fit(["validate", *common[:-1], "--ckpt_path=best"], tmp_path / "best")[0] == 2
    assert "ckpt_path is 'best', which is known only while a fit runs" in stopped(tmp_path / "best")[0]


# ---- a batch without targets ----


def test_a_batch_without_targets_moves_no_weight_and_is_counted(workplace: Workplace, tmp_path: Path) -> None:
    def fitted(batches: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        base = str(workplace.folder / "base")
        module = NALoRALightningModule(base, lora=LoRAOptions(r=2, alpha=4), adapter=AdapterOptions(write="never"))
        callback = GateImportanceCallback(warmup_steps=0, observer=ObserverOptions(max_tokens=None))
        quiet_trainer(tmp_path, callbacks=[callback]).fit(module, Batches(batches))
        weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        return weights, callback.state_dict()["mechanism"]

    (batch,) = some_batches(1)
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.warns(NoTargetTokensWarning, match="training batch 0 has no target token"):
        weights, statistics = fitted([without])
    # B begins at zero, and what has no gradient does not move.
    assert all(not value.any() for name, value in weights.items() if "lora_B" in name)
    assert statistics["steps"] == 1
    # Its tokens are real ones, whatever is predicted from them.
    assert torch.equal(statistics["responsiveness"], fitted([batch])[1]["responsiveness"])


# ---- many fits ----


def test_fits_leave_no_hooks_behind(workplace: Workplace, tmp_path: Path) -> None:
    module = NALoRALightningModule(str(workplace.folder / "base"), lora=LoRAOptions(r=2, alpha=4))
    counts = []
    for _ in range(3):
        callbacks = [GateImportanceCallback(warmup_steps=0), StepScaleCallback(), RunCheckpoint(dirpath=None)]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks[:2])
        trainer.fit(module, Batches(some_batches(2)))
        (optimizer,) = trainer.optimizers
        hooks = [
            hook
            for inner in module.modules()
            for store in (inner._forward_hooks, inner._forward_pre_hooks, inner._backward_hooks)
            for hook in store
        ]
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not any(parameter._backward_hooks for parameter in module.parameters())
        counts.append(len(hooks))
    assert counts == [0, 0, 0]


@pytest.fixture(autouse=True)
def _log_again() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def test_random_options_are_right_or_refused_in_one_sentence() -> None:
    outcomes = fuzz(10, seed=2)
    assert [outcome.text for outcome in outcomes if outcome.kind == "wrong"] == []
    checks = {check for outcome in outcomes for check in outcome.checks}
    assert checks >= {"held", "adapter"}


def test_a_combination_follows_from_its_number_and_seed() -> None:
    from pathlib import Path

    kinds = {"llama": "l", "gpt2": "g", "mixtral": "m"}
    first, again = (draw(5, 1, kinds, "data", Path("run")) for _ in range(2))
    assert first == again
    assert draw(6, 1, kinds, "data", Path("run")) != first


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_files_are_trained_on_to_the_letter_or_refused_in_one_sentence() -> None:
    figures = Figures()
    run(30, 0, figures)
    assert figures.files >= 30
    assert figures.accepted.total() >= 10
