"""Configurations to begin with, their schema, and completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from na_lora_lightning.cli.init import command_parser, shipped_configurations
from na_lora_lightning.cli.main import main

ROOT = Path(__file__).parents[2]
before_schemas = Version(version("jsonargparse")) < Version("4.53")
needs_schema = pytest.mark.skipif(before_schemas, reason="jsonargparse makes schemas from 4.53 on")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_shipped_configuration_is_listed_and_written_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    printed = capsys.readouterr().out
    names = {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    assert set(shipped_configurations()) == names
    assert {line.split()[0] for line in printed.splitlines() if line and not line.startswith("'")} == names
    assert max(map(len, printed.splitlines())) <= 80
    assert main(["init", "instruction", "--output", "my/run.yaml"]) == 0
    assert Path("my/run.yaml").read_text() == (ROOT / "configs" / "instruction.yaml").read_text()


def test_nothing_is_replaced_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    for arguments, message in (
        (["instruction"], "error: the file 'run.yaml' exists; give another --output, or --overwrite."),
        (["instructions"], "error: there is no configuration 'instructions'; use one of gemma3_270m, instruction,"),
        (["--nothing"], "see 'na-lora init --help'"),
    ):
        assert main(["init", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"
    assert main(["init", "quickstart", "--overwrite"]) == 0
    assert Path("run.yaml").read_text() == (ROOT / "configs" / "quickstart.yaml").read_text()


@needs_schema
def test_the_schema_knows_the_options_and_the_shipped_configurations_follow_it() -> None:
    # In a process of its own: Lightning makes classes of optimizers while it trains, which have no import path.
    command = [sys.executable, "-W", "ignore", "-m", "na_lora_lightning", "init", "instruction", "--schema"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    text = Path("run.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=run.schema.json\n")
    schema = json.loads(Path("run.schema.json").read_text())
    groups = schema["properties"]
    assert {"model", "data", "trainer", "gate_importance", "step_scale"} <= set(groups)

    def followed(value: Any, node: dict[str, Any], name: str) -> None:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if isinstance(value, dict) and "properties" in node:
            for key, inner in value.items():
                assert key in node["properties"], f"{name}.{key}"
                followed(inner, node["properties"][key], f"{name}.{key}")

    for file in shipped_configurations().values():
        content = yaml.safe_load(file.read_text())
        if "class_path" not in content["data"]:
            followed(content, schema, file.stem)
    # Where the configuration names a class of data, any class may stand there.
    parser = command_parser("fit", shipped_configurations()["smolvlm_256m"])
    assert "data" in {action.dest for action in parser._actions}


@pytest.mark.skipif(find_spec("shtab") is None, reason="shtab is not installed")
def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    asks = 'COMP_WORDS=({words}); COMP_CWORD={last}; {function}; echo "${{COMPREPLY[@]}}"'
    function = next(line.split("() {")[0] for line in script.splitlines() if line.startswith("_shtab_na_lora() {"))

    def completed(*words: str) -> list[str]:
        line = asks.format(words=" ".join(words), last=len(words) - 1, function=function)
        result = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
        return result.stdout.split()

    assert completed("na-lora", "in") == ["inspect", "init"]
    assert "--model.lora.r" in completed("na-lora", "fit", "--model.lora.r")
    assert completed("na-lora", "chat", "--comp") == ["--compare"]
