"""``na-lora inspect``: which gates a model has and which LoRA rows make them, before any training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from na_lora_lightning.core.pre_activations import ActivationInput, GateMethod, LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite

if TYPE_CHECKING:
    from rich.table import Table

    from na_lora_lightning.arguments import LoRAArguments
    from na_lora_lightning.model_loading import BaseModelSource


_WIDTH_OF_FILES = 160

_OBSERVED_AT = {
    ActivationInput: "input of the activation module",
    LayerOutput: "output of the LoRA layer",
    GateMethod: "argument of the experts' gate method",
}


def inspect_model(source: BaseModelSource, lora: LoRAArguments) -> GateMap:
    """Makes a model from its configuration, without its weights, adds LoRA to it, and finds its gates.

    Args:
        source: Which model; a folder that holds nothing but ``config.json`` will do.
        lora: Which layers get LoRA.

    Returns:
        All sites, and what was left out and why.

    Raises:
        ConfigurationError: The model cannot be made, or the LoRA options do not fit it.
        DiscoveryError: The gates cannot be determined.
    """
    from na_lora_lightning.core.discovery import discover_gates
    from na_lora_lightning.model_loading import add_lora
    from na_lora_lightning.weightless import fill_in, model_without_weights

    model = add_lora(model_without_weights(source), lora, source)
    fill_in(model)
    return discover_gates(model)


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
                "experts": None if site.experts is None else site.experts.count,
                "observed_at": _OBSERVED_AT[type(site.source)],
                "lora_layer": site.lora_layer_name,
                "parameter": getattr(site.lora_layer, "parameter_name", None),
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
    for column in ("layer", "activation", "kind", "channels", "experts", "LoRA layer", "rows of lora_B", "rank"):
        justify: Literal["right", "left"] = "right" if column in ("layer", "channels", "experts", "rank") else "left"
        found.add_column(column, justify=justify, overflow="fold")
    for site in as_dictionary(gates)["sites"]:
        layer = "" if site["layer"] is None else str(site["layer"])
        ranks = ", ".join(str(rank) for rank in site["rank"].values())
        activation = site["activation"] if site["self_gated"] else f"{site['activation']} (not self-gated)"
        experts = "" if site["experts"] is None else str(site["experts"])
        lora_layer = site["lora_layer"] if site["parameter"] is None else f"{site['lora_layer']} ({site['parameter']})"
        channels = str(site["channels"])
        found.add_row(layer, activation, site["kind"], channels, experts, lora_layer, site["rows"], ranks)
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
        description=(
            "Show which gates a model has, which activation each uses, and which LoRA rows make it. Only the model's "
            "configuration is read, not its weights."
        ),
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
        if not console.is_terminal:
            console = Console(width=_WIDTH_OF_FILES)
        for table in as_tables(gates):
            console.print(table)
    gates.require()
    return 0
