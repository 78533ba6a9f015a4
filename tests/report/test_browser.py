"""The report and TensorBoard's pages in a real browser: no errors, no empty pictures, no text out of its box."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from browser import PROGRAM, Tab, browser
from test_report import write_run

from na_lora_lightning.callbacks.tensorboard_pages import TensorBoardPages
from na_lora_lightning.cli.main import main
from na_lora_lightning.curves import HEAT_MAPS, overview_tag
from na_lora_lightning.history import HistoryWriter
from na_lora_lightning.pictures import as_pixels, as_png, heat_map

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium or chrome")

# Where pictures are kept to be looked at; by default nowhere.
PICTURES = os.environ.get("BROWSER_PICTURES")
LONG = "How many sisters does the brother of the_sister_whose_name_is_longer_than_a_telephone_is_wide_have? " * 4
SHOWN = {"wide": (1280, 900), "phone": (390, 844), "print": (720, 1000)}


def run_in_browser(folder: Path, visit: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        async with browser(folder) as tab:
            await visit(tab)

    asyncio.run(whole())


async def kept(tab: Tab, name: str) -> None:
    if PICTURES is not None:
        await tab.picture(Path(PICTURES, f"{name}.png"), whole=True)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs with what is long: a prompt, an answer, the name of a file, a setting, and a configuration."""
    found = []
    for name, lr in (("first", 0.001), ("second", 0.002)):
        run = write_run(
            tmp_path / "runs" / name,
            layers=30,
            model="/home/somebody/models/an-organisation/" + "a-model-with-a-long-name-" * 3,
            **{"data.train": "/data/" + "train" * 30 + ".jsonl", "optimizer.init_args.lr": lr},
        )
        (run / "config.yaml").write_text(f"long: {'x' * 300}\n")
        for step in (0, 40):
            metrics = {f"validation/{each}": 0.5 + step for each in ("loss", "perplexity", "a_rather_long_metric")}
            sample = {"prompt": LONG, "reference": "3", "answer": LONG, "correct": False}
            HistoryWriter(run).write("validation", step, metrics=metrics, samples=[sample] * 3)
        found.append(str(run))
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_the_report(tmp_path: Path, runs: list[str], count: int) -> None:
    page = tmp_path / "report.html"
    assert main(["report", *runs[:count], "--output", str(page)]) == 0

    async def visit(tab: Tab) -> None:
        grounds = {}
        for kind, (width, height) in SHOWN.items():
            for dark in (False, True):
                await tab.show(width, height, dark, "print" if kind == "print" else "screen")
                await tab.open(page.as_uri())
                seen = await tab.look("What was trained", "To run it again")
                await kept(tab, f"report-{count}-{kind}-{'dark' if dark else 'light'}")
                assert tab.errors == []
                assert seen["empty"] == []
                assert seen["outside"] == [], (kind, dark)
                # Nobody scrolls on paper, or finds on a telephone what is beyond its edge.
                assert seen["cut"] == [] or kind == "wide", (kind, dark)
                assert seen["wide"] <= 0
                assert seen["pictures"] >= 7
                grounds[kind, dark] = seen["ground"]
        # Paper is white whatever the screen is.
        assert grounds["print", True] == grounds["print", False] == grounds["wide", False] == "rgb(255, 255, 255)"
        assert grounds["wide", True] == grounds["phone", True] == "rgb(20, 24, 28)"

    run_in_browser(tmp_path / "browser", visit)


def write_events(folder: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(folder, name="runs", default_hp_metric=False)
    tags = [overview_tag(curve.group) for curve in HEAT_MAPS]
    metrics = ["train/loss", "validation/loss", "validation/exact_match"]
    pages = TensorBoardPages(logger, {"lr": 0.001, "model": LONG}, metrics, tags)
    pages.describe(tags)
    for step in range(0, 50, 10):
        logger.log_metrics(dict.fromkeys([*metrics, *tags], 1 / (1 + step)), step=step)
    grid = [[layer * step / 100 for step in range(5)] for layer in range(30)]
    import numpy as np

    for curve in HEAT_MAPS:
        figure = heat_map(curve.title, [f"layer_{n:02d}" for n in range(30)], range(5), np.array(grid))
        logger.experiment.add_image(
            f"{overview_tag(curve.group)}_by_layer", as_pixels(as_png(figure)), 4, dataformats="HWC"
        )
    pages.show_samples([{"prompt": LONG, "reference": "3", "answer": "<script>alert(1)</script>"}], 40)
    logger.finalize("success")


# TensorBoard imports what it sanitises text with.
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")
def test_the_pages_of_tensorboard(tmp_path: Path) -> None:
    from tensorboard import program

    write_events(tmp_path)
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(tmp_path / "runs"), "--port", "0", "--load_fast", "false"])
    address = server.launch()
    pages = {
        "timeseries": (f"{2 * len(HEAT_MAPS)} cards", "version_0"),
        "scalars": ("train", "gates"),
        "custom_scalars": ("Training", "Gates, over all layers"),
        "images": ("gates/responsiveness_by_layer",),
        "text": ("samples", "When it is high"),
        "hparams": ("validation/exact_match", "lr"),
    }

    async def visit(tab: Tab) -> None:
        for name, texts in pages.items():
            for dark, ground in ((False, "rgba(0, 0, 0, 0)"), (True, "rgb(48, 48, 48)")):
                await tab.show(*SHOWN["wide"], dark)
                await tab.open(f"{address}#{name}")
                seen = await tab.look(*texts, pictures={"images": len(HEAT_MAPS)}.get(name, 0))
                await kept(tab, f"tensorboard-{name}-{'dark' if dark else 'light'}")
                # Its scripts draw charts when they come into view.
                assert [name for name in seen["empty"] if not name.startswith("svg")] == []
                # Where it puts the labels of its axes is its own affair.
                assert [name for name in seen["outside"] if not name.startswith("svg")] == []
                assert seen["ground"] == ground
                assert tab.errors == []

    run_in_browser(tmp_path / "browser", visit)
