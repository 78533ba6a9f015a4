"""``na-lora inspect``: which gates a model has and which LoRA rows make them, before any training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from na_lora_lightning.core.sites import GateMap, GateSite

if TYPE_CHECKING:
    from rich.table import Table

    from na_lora_lightning.arguments import LoRAArguments
    from na_lora_lightning.model_loading import BaseModelSource


def inspect_model(source: BaseModelSource, lora: LoRAArguments) -> GateMap:
    """Loads a model, adds LoRA to it, and finds its gates.

    Args:
        source: Which model.
        lora: Which layers get LoRA.

    Returns:
        All sites, and what was left out and why.

    Raises:
        ConfigurationError: The model cannot be loaded, or the LoRA options do not fit it.
        DiscoveryError: The gates cannot be determined.
    """
    import torch

    from na_lora_lightning.core.discovery import discover_gates
    from na_lora_lightning.model_loading import add_lora, load_base_model

    model = load_base_model(source, torch.device("cpu"))
    return discover_gates(add_lora(model, lora, source))


def describe_rows(site: GateSite) -> str:
    """The site's rows of ``lora_B`` as Python would slice them, ``0:1536`` or ``1:64:2``."""
    rows = site.row_slice
    if rows is None:
        return f"{site.channels} rows, unordered"
    return f"{rows.start}:{rows.stop}" if rows.step == 1 else f"{rows.start}:{rows.stop}:{rows.step}"


def as_dictionary(gates: GateMap) -> dict[str, Any]:
    """The map as plain values, for ``--json``."""
    return {
        "channels": gates.channels,
        "sites": [
            {
                "name": site.name,
                "layer": site.layer,
                "kind": site.kind,
                "activation": site.activation.name,
                "self_gated": site.activation.self_gated,
                "channels": site.channels,
                "lora_layer": site.lora_layer_name,
                "rows": describe_rows(site),
                "rank": {adapter: int(site.lora_layer.r[adapter]) for adapter in site.adapters},  # type: ignore[index]
                "output_layer": site.output_layer_name,
                "found_by": site.found_by,
            }
            for site in gates.sites
        ],
        "left_out": [
            {"name": entry.name, "activation": entry.activation, "reason": entry.reason} for entry in gates.left_out
        ],
    }


def as_tables(gates: GateMap) -> list[Table]:
    """The map as tables for a terminal."""
    from rich.table import Table

    found = Table(title=f"{len(gates)} gate sites, {gates.channels} gate channels", title_justify="left")
    for column in ("layer", "activation", "kind", "channels", "LoRA layer", "rows of lora_B", "rank"):
        justify: Literal["right", "left"] = "right" if column in ("layer", "channels", "rank") else "left"
        found.add_column(column, justify=justify, overflow="fold")
    for site in as_dictionary(gates)["sites"]:
        layer = "" if site["layer"] is None else str(site["layer"])
        ranks = ", ".join(str(rank) for rank in site["rank"].values())
        found.add_row(
            layer, site["activation"], site["kind"], str(site["channels"]), site["lora_layer"], site["rows"], ranks
        )
    if not gates.left_out:
        return [found]
    left_out = Table(title=f"{len(gates.left_out)} activations left out", title_justify="left")
    for column in ("activation", "module", "reason"):
        left_out.add_column(column, overflow="fold")
    for entry in gates.left_out:
        left_out.add_row(entry.activation, entry.name, entry.reason)
    return [found, left_out]


def main(arguments: list[str]) -> int:
    """Runs ``na-lora inspect``.

    Args:
        arguments: What follows ``inspect`` on the command line.

    Returns:
        0 where every gate can be adapted.

    Raises:
        NALoRAError: The model or the options cannot be used, or a gate has no LoRA (after the table was printed).
    """
    from jsonargparse import ArgumentParser

    from na_lora_lightning.arguments import LoRAArguments
    from na_lora_lightning.model_loading import BaseModelSource

    parser = ArgumentParser(
        prog="na-lora inspect",
        description="Show which gates a model has, which activation each uses, and which LoRA rows make it.",
    )
    parser.add_argument("model", type=str, help="folder of a model, or its name on the hub")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the model")
    parser.add_class_arguments(LoRAArguments, "lora")
    options = parser.parse_args(arguments)
    source = BaseModelSource(options.model, trust_remote_code=options.trust_remote_code)
    gates = inspect_model(source, LoRAArguments(**vars(options.lora)))
    if options.json:
        print(json.dumps(as_dictionary(gates), indent=2))
    else:
        from rich.console import Console

        console = Console()
        for table in as_tables(gates):
            console.print(table)
    gates.require()
    return 0
