"""The page about runs: its numbers, its escapes, and what it does with runs that were killed or never were."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from na_lora_lightning.cli.main import main
from na_lora_lightning.history import FILE, HistoryWriter
from na_lora_lightning.report import facts
from na_lora_lightning.report.page import make_page
from na_lora_lightning.report.runs import read_runs


class Page(HTMLParser):
    """Text, elements and addresses of a page; fails on elements that are not closed."""

    EMPTY = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attributes if name.endswith(("href", "src"))]
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)


def page_of(*folders: Path) -> Page:
    return Page(make_page(read_runs([str(folder) for folder in folders])))


def test_the_page_of_one_run_answers_in_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("seed_everything: 0\n")
    text = page_of(run).text
    for sentence in (
        "base, on train.jsonl; ended at step 40.",
        "LoRA trains 1,234 of 123,456 parameters.",
        "Settings: learning rate 0.001.",
        "Did it learn? Yes: validation/exact_match went from 0.25 before training to 0.75 at step 40.",
        "rows of the least responsive 10 % (60) held from step 11.",
        "Rows were held from step 20 on, as far as logged; 10 % of them at the last.",
        "What changed most? Layer 4 moves its selection 5.0 times as much as the median layer (0.05 against 0.01).",
        "3 of 600 channels had a mean slope below 0.01 at every logged step after step 0, "
        "so their gates hardly respond: "
        "3 in layer 1.",
        "validation before training at step 40 change validation/exact_match 0.25 0.75 +0.5 validation/loss 2 1.5 -0.5",
        f"na-lora fit --config {run / 'config.yaml'}",
        "1+1? 2 three 2",
    ):
        assert sentence in text, sentence


@pytest.mark.parametrize(
    ("name", "last", "verdict"),
    [
        ("loss", 3.0, "No: "),
        ("loss", 1.0, "Yes: "),
        ("exact_match", 1.0, "No: "),
        ("exact_match", 2.0, "Not by this measure: "),
        ("perplexity", float("inf"), "validation/"),
    ],
)
def test_whether_it_learnt_is_said_in_a_word(tmp_path: Path, name: str, last: float, verdict: str) -> None:
    path = write_run(tmp_path / "run")
    # Before anything else that was measured.
    entries = [json.loads(line) for line in (path / FILE).read_text().splitlines()]
    (path / FILE).write_text("".join(json.dumps(each) + "\n" for each in entries if each["type"] != "validation"))
    for step, value in ((0, 2.0), (40, last)):
        HistoryWriter(path).write("validation", step, metrics={f"validation/{name}": value})
    assert facts.headline(read_runs([str(path)])[0]).startswith(verdict)


def test_nothing_stands_out_where_nothing_does(tmp_path: Path) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "run", standing_out=None))])
    assert facts.hints(run)[0].startswith("No layer stands out: Layer ")


def test_it_takes_nothing_from_elsewhere_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert not {"script", "link", "iframe", "object", "img"} & set(page.elements)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    content = make_page(read_runs([str(tmp_path / "a")]))
    assert len(content) < 1_000_000
    without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', "", content)
    # Names of vocabularies are no addresses that anything is loaded from.
    names = {"http://www.w3.org", "http://purl.org", "http://creativecommons.org"}
    urls = set(re.findall(r"(?:https?:)?//[\w.]+", without_pictures)) - names
    assert urls == set()


@pytest.mark.parametrize(
    "evil", ['<script>alert("1")</script>', '</svg><b>$x$ & "q" \'', "{{ 7*7 }}", "$\\frac$", "\ud800"]
)
def test_text_of_records_and_names_is_shown_as_it_is_written(tmp_path: Path, evil: str) -> None:
    run, other = write_run(tmp_path / "run", **{"data.train": evil}), write_run(tmp_path / "other")
    sample = {"prompt": evil, "reference": evil, "answer": evil, "correct": True}
    HistoryWriter(run).write("validation", 41, metrics={evil: 1.0}, samples=[sample])
    (run / "config.yaml").write_text(evil, encoding="utf-8", errors="replace")
    page = page_of(run)
    assert page.text.count(" ".join(evil.split())) >= 5
    assert not {"script", "b"} & set(page.elements)
    assert main(["report", str(run), str(other), "--output", str(tmp_path / "page.html")]) == 0
    assert not {"script", "b"} & set(Page((tmp_path / "page.html").read_text()).elements)


def test_two_runs_stand_side_by_side_with_their_difference(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", standing_out=1, **{"optimizer.init_args.lr": 0.002})
    HistoryWriter(second).write("validation", 40, metrics={"validation/loss": 1.25})
    page = page_of(first, second)
    name_a, name_b = f"{tmp_path.name}/a", f"{tmp_path.name}/b"
    assert f"{name_a} {name_b} optimizer.init_args.lr 0.001 0.002" in page.text
    assert "validation/loss 1.5 1.25 -0.25" in page.text
    assert page.text.count(f"{name_b} minus {name_a}") >= 4
    assert "model" not in [name for name, _ in facts.differing_options(read_runs([str(first), str(second)]))]


def test_many_runs_are_a_table_and_curves(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{n}", **{"optimizer.init_args.lr": n / 1000}) for n in range(5)]
    page = page_of(*runs)
    assert "optimizer.init_args.lr 0 0.001 0.002 0.003 0.004" in page.text
    assert "validation/loss 1.5 1.5 1.5 1.5 1.5" in page.text
    assert page.elements.count("svg") == 5


def test_runs_that_are_going_on_or_were_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ended=False)
    content = (run / FILE).read_bytes()
    assert "at step 40 of 40: going on, or stopped without a word, last heard of" in page_of(run).text
    for kept in (len(content) // 2, len(content) - 20, content.index(b"\n") + 1):
        (run / FILE).write_bytes(content[:kept])
        text = page_of(run).text
        assert "going on, or stopped without a word" in text
    assert "The gates were not measured yet." in text
    assert "No metric was measured before and after training." in text
    writer = HistoryWriter(run)
    writer.write("start", 0, options={}, sites=[])
    assert "resumed 1 time." in page_of(run).text


def test_what_is_no_run_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / FILE).write_text("{")
    write_run(tmp_path / "runs" / "version_0")
    cases = {
        str(tmp_path / "nowhere"): "there is no folder ",
        str(tmp_path / "empty"): f"holds no {FILE}, so there is no run to report; give the folder in which",
        str(tmp_path / "begun"): f"holds a {FILE} in which no fit begins",
        str(
            tmp_path / "runs"
        ): f"holds no {FILE}, so there is no run to report; give {tmp_path / 'runs' / 'version_0'}.",
    }
    for folder, sentence in cases.items():
        assert main(["report", folder]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main(["report"]) == 2
    assert capsys.readouterr().err == "error: no run is given; give the folder of at least one.\n"
    run = str(tmp_path / "runs" / "version_0")
    assert main(["report", run, "--output", str(tmp_path / "runs")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["report", run]) == 0
    assert capsys.readouterr().out == f"Report {tmp_path / 'runs' / 'version_0' / 'report.html'}\n"


def test_it_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    code = (
        "import sys; from na_lora_lightning.cli.main import main; main(sys.argv[1:]); "
        "print({name for name in ('torch', 'lightning', 'transformers', 'peft') if name in sys.modules})"
    )
    run = str(write_run(tmp_path / "run"))
    printed = subprocess.run([sys.executable, "-c", code, "report", run], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "set()"


GROUPS = ("gate_responsiveness", "selection_misalignment", "selection_share", "gate_regime_suppressed")


def write_run(
    folder: Path,
    layers: int = 6,
    steps: int = 40,
    every: int = 10,
    standing_out: int | None = 4,
    ended: bool = True,
    **options: Any,
) -> Path:
    """Writes a history: layer ``standing_out`` moves its selection 5 times as much as the others do."""
    writer = HistoryWriter(folder)
    sites = [{"label": f"layer_{n:02d}", "channels": 100, "layer": n, "activation": "silu"} for n in range(layers)]
    start: dict[str, Any] = {
        "in_force": "NA-LoRA: 6 silu gates, 600 channels; rows of the least responsive 10 % (60) held from step 11.",
        "options": {"model": "base", "data.train": "train.jsonl", "optimizer.init_args.lr": 0.001, **options},
        "parameters": {"trainable": 1234, "total": 123_456},
        "mechanisms": {"importance": {}},
        "planned_steps": steps,
        "sites": sites,
    }
    writer.write("start", 0, **start)
    sample = {"prompt": "1+1?", "reference": "2", "answer": "three", "correct": False}
    writer.write("validation", 0, metrics={"validation/loss": 2.0, "validation/exact_match": 0.25}, samples=[sample])
    generator = np.random.default_rng(0)
    for step in range(every, steps + 1, every):
        gates = {group: (0.5 + 0.01 * generator.random(layers)).tolist() for group in GROUPS}
        moved = np.full(layers, 0.01 * step / steps)
        if standing_out is not None:
            moved[standing_out] *= 5
        gates["selection_misalignment"] = moved.tolist()
        gates["gate_mask_density"] = [0.9 if step > every else 1.0] * layers
        writer.write("step", step, gates=gates, metrics={"train/loss": 2.0 - step / steps, "learning_rate": 0.001})
    writer.write("channels", steps, since=0, below=0.01, quiet=[0, 3] + [0] * (layers - 2))
    answer = {**sample, "answer": "2", "correct": True}
    writer.write(
        "validation", steps, metrics={"validation/loss": 1.5, "validation/exact_match": 0.75}, samples=[answer]
    )
    if ended:
        writer.write("end", steps, outcome="ended")
    return folder
