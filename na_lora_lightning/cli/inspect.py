"""``na-lora inspect``: which gates a model has and which LoRA rows make them, before any training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from na_lora_lightning.core.pre_activations import ActivationInput, GateMethod, LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from na_lora_lightning.arguments import LoRAOptions
    from na_lora_lightning.models.fast_lora import LoRALayerReport
    from na_lora_lightning.models.source import BaseModelSource


_WIDTH_OF_FILES = 160

_OBSERVED_AT = {
    ActivationInput: "input of the activation module",
    LayerOutput: "output of the LoRA layer",
    GateMethod: "argument of the experts' gate method",
}


def inspect_model(source: BaseModelSource, lora: LoRAOptions) -> GateMap:
    """Finds the gates of a model, as :func:`inspect_layers` does."""
    return inspect_layers(source, lora)[0]


def inspect_layers(source: BaseModelSource, lora: LoRAOptions) -> tuple[GateMap, LoRALayerReport]:
    """Makes a model from its configuration, without its weights, adds LoRA to it, and finds its gates.

    Args:
        source: Which model; a folder that holds nothing but ``config.json`` will do.
        lora: Which layers get LoRA.

    Returns:
        All sites, and what was left out and why; how its LoRA layers are computed.

    Raises:
        ConfigurationError: The model cannot be made, or the LoRA options do not fit it.
        DiscoveryError: The gates cannot be determined.
    """
    from na_lora_lightning.core.discovery.gates import discover_gates
    from na_lora_lightning.models.fast_lora import lora_layer_report
    from na_lora_lightning.models.lora import add_lora
    from na_lora_lightning.models.weightless import fill_in, model_without_weights
    from na_lora_lightning.modules.losses import model_inputs

    base = model_without_weights(source)
    inputs = _example_inputs(base, source, lora)
    model = add_lora(base, lora, source)
    report = lora_layer_report(model)
    fill_in(model)
    if inputs is not None:
        inputs = {**model_inputs(model, inputs), "use_cache": False} if "attention_mask" in inputs else inputs
    return discover_gates(model, inputs), report


def _example_inputs(base: PreTrainedModel, source: BaseModelSource, lora: LoRAOptions) -> dict[str, Any] | None:
    """What reaches every part with LoRA; None stands for a few tokens of text."""
    from na_lora_lightning.core.model_parts import is_multimodal
    from na_lora_lightning.data.images.batching import example_of_processor
    from na_lora_lightning.data.processors import load_processor
    from na_lora_lightning.models.dual_encoder import example_inputs
    from na_lora_lightning.models.source import DUAL_ENCODERS

    if base.config.model_type in DUAL_ENCODERS:
        return dict(example_inputs(base.config))
    if not is_multimodal(base) or not {"vision", "projector"} & set(lora.parts):
        return None
    try:
        processor = load_processor(
            source.resolved_name_or_path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        return dict(example_of_processor(processor))
    except ConfigurationError as error:
        raise ConfigurationError(
            f"to find the gates that images reach, an example is made with the model's processor: {error}"
        ) from error


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
                "part": site.part,
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

    sites = as_dictionary(gates)["sites"]
    # Only models of several parts have something to say in the first column.
    with_parts = any(site["part"] is not None for site in sites)
    found = Table(title=f"{len(gates)} gate sites, {gates.channels} gate channels", title_justify="left")
    if with_parts:
        found.add_column("part")
    for column in ("layer", "activation", "kind", "channels", "experts", "LoRA layer", "rows of lora_B", "rank"):
        justify: Literal["right", "left"] = "right" if column in ("layer", "channels", "experts", "rank") else "left"
        found.add_column(column, justify=justify, overflow="fold")
    for site in sites:
        layer = "" if site["layer"] is None else str(site["layer"])
        ranks = ", ".join(str(rank) for rank in site["rank"].values())
        activation = site["activation"] if site["self_gated"] else f"{site['activation']} (not self-gated)"
        experts = "" if site["experts"] is None else str(site["experts"])
        lora_layer = site["lora_layer"] if site["parameter"] is None else f"{site['lora_layer']} ({site['parameter']})"
        channels = str(site["channels"])
        row = [layer, activation, site["kind"], channels, experts, lora_layer, site["rows"], ranks]
        found.add_row(*([site["part"] or ""] if with_parts else []), *row)
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
    from jsonargparse import ArgumentError

    from na_lora_lightning.arguments import LoRAOptions
    from na_lora_lightning.cli.arguments import PlainParser
    from na_lora_lightning.cli.errors import explain
    from na_lora_lightning.models.source import BaseModelSource

    parser = PlainParser(
        prog="na-lora inspect",
        description=(
            "Show which gates a model has, which activation each uses, and which LoRA rows make it. Only the model's "
            "configuration is read, not its weights."
        ),
        exit_on_error=False,
    )
    parser.add_argument("model", type=str, help="folder of a model, or its name on the hub")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the model")
    parser.add_class_arguments(LoRAOptions, "lora")
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        keys = {action.dest for action in parser._actions}
        raise ConfigurationError(explain(str(error), keys, (), ())) from error
    source = BaseModelSource(options.model, trust_remote_code=options.trust_remote_code)
    gates, layers = inspect_layers(source, LoRAOptions(**vars(options.lora)))
    if options.json:
        print(json.dumps(as_dictionary(gates) | {"lora_layers": asdict(layers)}, indent=2))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH_OF_FILES)
        for table in as_tables(gates):
            console.print(table)
        for line in layers.lines():
            console.print(line, markup=False, highlight=False)
    gates.require()
    return 0
