"""``na-lora inspect``: which gates a model has and which LoRA rows make them, before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from na_lora_lightning.core.pre_activations import ActivationInput, GateMethod, LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from na_lora_lightning.arguments import LoRAOptions
    from na_lora_lightning.cli.arguments import PlainParser
    from na_lora_lightning.models.fast_lora import LoRALayerReport
    from na_lora_lightning.models.source import BaseModelSource


_WIDTH_OF_FILES = 80
_COLUMNS = ("part", "layers", "activation", "kind", "channels", "experts", "LoRA layer", "rows of B", "rank")
_NUMBERS = ("channels", "experts", "rank")
_UNBROKEN = (*_NUMBERS, "part", "activation", "kind")

_OBSERVED_AT = {
    ActivationInput: "input of the activation module",
    LayerOutput: "output of the LoRA layer",
    GateMethod: "argument of the experts' gate method",
}


def inspect_model(source: BaseModelSource, lora: LoRAOptions) -> GateMap:
    """Finds the gates of a model, as :func:`inspect_layers` does."""
    return inspect_layers(source, lora)[0]


def inspect_layers(
    source: BaseModelSource, lora: LoRAOptions, quantization: str | None = None
) -> tuple[GateMap, LoRALayerReport, tuple[int, int]]:
    """Makes a model from its configuration, without its weights, adds LoRA to it, and finds its gates.

    Args:
        source: Which model; a folder that holds nothing but ``config.json`` will do, and a tokenizer for new tokens.
        lora: Which layers get LoRA.
        quantization: How a fit would quantise its weights; they may be stored so already.

    Returns:
        All sites, and what was left out and why; how its LoRA layers are computed; how many
        parameters train, and how many there are.

    Raises:
        ConfigurationError: The model cannot be made, or the LoRA options do not fit it.
        DiscoveryError: The gates cannot be determined.
    """
    from na_lora_lightning.core.discovery.gates import discover_gates
    from na_lora_lightning.models.fast_lora import LoRALayerReport, lora_layer_report
    from na_lora_lightning.models.loftq import own_base
    from na_lora_lightning.models.lora import add_lora
    from na_lora_lightning.models.quantization import stored_quantization
    from na_lora_lightning.models.source import load_config
    from na_lora_lightning.models.weightless import fill_in, model_without_weights
    from na_lora_lightning.modules.losses import model_inputs

    own_base(lora, quantization)
    base = model_without_weights(source)
    inputs = _example_inputs(base, source, lora)
    model = add_lora(base, lora, source)
    report = lora_layer_report(model)
    method = quantization or stored_quantization(load_config(source))
    if method is not None and report.fast:
        # The model is made without its weights, and so without what they are stored in.
        reason = f"its weights are quantised ({method}), which PEFT has layers of its own for"
        report = LoRALayerReport((), {**report.left, reason: report.fast})
    parameters = model.get_nb_trainable_parameters()
    fill_in(model)
    if inputs is not None:
        inputs = {**model_inputs(model, inputs), "use_cache": False} if "attention_mask" in inputs else inputs
    return discover_gates(model, inputs), report, parameters


def _example_inputs(base: PreTrainedModel, source: BaseModelSource, lora: LoRAOptions) -> dict[str, Any] | None:
    """What reaches every part with LoRA; None stands for a few tokens of text."""
    from na_lora_lightning.cli.memory import example_of_model
    from na_lora_lightning.core.model_parts import is_multimodal
    from na_lora_lightning.models.dual_encoder import example_inputs
    from na_lora_lightning.models.source import DUAL_ENCODERS

    if base.config.model_type in DUAL_ENCODERS:
        return dict(example_inputs(base.config))
    if not is_multimodal(base) or not {"vision", "projector"} & set(lora.parts):
        return None
    try:
        return example_of_model(source)
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
    """The map as tables for a terminal of 80 columns: layers that are equal share a line."""
    from rich import box
    from rich.table import Table

    rows = [_row(site) for site in as_dictionary(gates)["sites"]]
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer, *others in rows:
        groups.setdefault(tuple(others), []).append(layer)
    found = Table(
        title=f"{len(gates)} gate sites, {gates.channels:,} gate channels",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    lines = [(others[0], _ranges(layers), *others[1:]) for others, layers in groups.items()]
    # A column in which no line has anything is left out.
    shown = [index for index in range(len(_COLUMNS)) if any(line[index] for line in lines)]
    for index in shown:
        justify: Literal["right", "left"] = "right" if _COLUMNS[index] in _NUMBERS else "left"
        found.add_column(_COLUMNS[index], justify=justify, overflow="fold", no_wrap=_COLUMNS[index] in _UNBROKEN)
    for line in lines:
        found.add_row(*(line[index] for index in shown))
    if not gates.left_out:
        return [found]
    left_out = Table(title=f"{len(gates.left_out)} activations left out", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("activation", "module", "reason"):
        left_out.add_column(column, overflow="fold")
    for (activation, name, reason), numbers in _equal_apart_from_layer(
        [(entry.activation, entry.name, entry.reason) for entry in gates.left_out]
    ).items():
        left_out.add_row(activation, name if len(numbers) == 1 else f"{name} ({_ranges(numbers)})", reason)
    return [found, left_out]


def _row(site: dict[str, Any]) -> tuple[str, ...]:
    """Layer, and what of the site may be equal in other layers."""
    layer = "" if site["layer"] is None else str(site["layer"])
    experts = "" if site["experts"] is None else str(site["experts"])
    activation = site["activation"] if site["self_gated"] else f"{site['activation']} (not self-gated)"
    name = site["lora_layer"]
    if layer:
        # The rest of the name is in --json; of experts that PEFT wraps twice, what it wraps is no news.
        name = f"…{re.split(rf'(?:^|[.]){layer}[.]', name, maxsplit=1)[-1]}"
    name = name.replace(".base_layer", "")
    name += "" if site["parameter"] is None else f" ({site['parameter']})"
    ranks = ", ".join(str(rank) for rank in site["rank"].values())
    return (
        layer, site["part"] or "", activation, site["kind"], str(site["channels"]), experts, name, site["rows"], ranks
    )  # fmt: skip


def _equal_apart_from_layer(entries: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], list[str]]:
    """Entries whose texts differ by the number of a layer alone, each once, with those numbers."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    first: dict[tuple[str, str, str], tuple[str, str, str]] = {}
    for activation, name, reason in entries:
        number = re.search(r"(?<=[.])\d+(?=[.])", name)
        layer = number[0] if number else ""
        name_of_all, reason_of_all = (text.replace(f".{layer}.", ".*.") if layer else text for text in (name, reason))
        same = (activation, name_of_all, reason_of_all)
        groups.setdefault(same, []).append(layer)
        first.setdefault(same, (activation, name, reason))
    return {same if len(numbers) > 1 else first[same]: numbers for same, numbers in groups.items()}


def _ranges(layers: Sequence[str]) -> str:
    """``0-29`` or ``0, 2, 4-6`` of numbers in order; anything else as it is."""
    if not all(layer.isdigit() for layer in layers):
        return ", ".join(dict.fromkeys(filter(None, layers)))
    spans: list[list[int]] = []
    for number in sorted({int(layer) for layer in layers}):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def options_parser() -> PlainParser:
    """The parser of its options."""
    from na_lora_lightning.arguments import LoRAOptions
    from na_lora_lightning.cli.arguments import PlainParser
    from na_lora_lightning.cli.memory import StepSize
    from na_lora_lightning.models.quantization import Kind

    parser = PlainParser(
        prog="na-lora inspect",
        description=(
            "Show which gates a model has, which activation each uses, and which LoRA rows make it. Only the model's "
            "configuration is read, not its weights."
        ),
        exit_on_error=False,
    )
    parser.add_argument("model", type=str, nargs="?", help="folder of a model, or its name on the hub")
    parser.add_argument("-c", "--config", type=str, help="configuration of a run to take options from")
    parser.add_argument("--memory", type=bool, default=True, help="estimate the memory of a training step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--new_tokens", type=list[str] | None, help="texts that are one token each")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the model")
    parser.add_argument(
        "--quantization", type=Kind | None, default=None, help="in what form a fit would hold the base weights"
    )
    parser.add_class_arguments(StepSize, None)
    parser.add_class_arguments(LoRAOptions, "lora")
    return parser


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
    from na_lora_lightning.cli.arguments import config_files
    from na_lora_lightning.cli.errors import explain
    from na_lora_lightning.cli.memory import StepSize, estimate_step, options_of_run
    from na_lora_lightning.models.source import BaseModelSource

    parser = options_parser()
    try:
        for file in config_files(arguments):
            parser.set_defaults(options_of_run(file))
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        keys = {action.dest for action in parser._actions}
        raise ConfigurationError(explain(str(error), keys, (), ())) from error
    if options.model is None:
        raise ConfigurationError("no model is given; give its folder or its name on the hub.")
    source = BaseModelSource(
        options.model, trust_remote_code=options.trust_remote_code, new_tokens=options.new_tokens or ()
    )
    lora = LoRAOptions(**vars(options.lora))
    step = StepSize(**{field.name: options[field.name] for field in fields(StepSize)})
    gates, layers, (trainable, total) = inspect_layers(source, lora, options.quantization)
    sentence, memory = estimate_step(source, lora, step, options.quantization) if options.memory else ("", None)
    if options.json:
        more = {
            "lora_layers": asdict(layers),
            "parameters": {"trainable": trainable, "total": total},
            "memory": None if memory is None else asdict(memory),
        }
        print(json.dumps(as_dictionary(gates) | more, indent=2))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH_OF_FILES)
        for table in as_tables(gates):
            console.print(table)
        console.print(f"LoRA trains {trainable:,} of {total:,} parameters ({100 * trainable / total:.3g} %).")
        for line in layers.lines():
            console.print(line, markup=False, highlight=False)
        console.print(sentence, markup=False, highlight=False)
    gates.require()
    return 0
