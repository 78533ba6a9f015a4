"""What all tests have in common."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from PIL import Image
from tiny_models import GPT2_TARGETS, LLAMA_TARGETS, tiny_gpt2, tiny_llama, with_lora


def pytest_configure(config: pytest.Config) -> None:
    """Fits of a few steps of tiny models, often within the warm-up, are what tests do; who tests the warning asks."""
    config.addinivalue_line("filterwarnings", "ignore::na_lora_lightning.errors.PlainLoRAWarning")
    # In a job of a cluster, Lightning would take its processes and ranks from there.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    # Threads of several processes wait for each other's cores.
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _drawn_in_no_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a fit of a few steps would go into its heat maps."""
    if "draws" not in request.keywords:
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "png")
        monkeypatch.setattr("na_lora_lightning.callbacks.monitor.heat_map", lambda *arguments: None)
        monkeypatch.setattr("na_lora_lightning.callbacks.monitor.as_png", lambda figure: file.getvalue())


@pytest.fixture(params=["llama", "gpt2"])
def make_peft_model(request: pytest.FixtureRequest) -> Callable[..., PeftModel]:
    """A factory of a fresh, identical PEFT model at each call: Llama-like, then GPT-2-like."""

    def make(**options: object) -> PeftModel:
        if request.param == "llama":
            return with_lora(tiny_llama(), LLAMA_TARGETS, **options)
        return with_lora(tiny_gpt2(), GPT2_TARGETS, **options)

    return make
