"""What was trained, on what and how, as plain values: for the history of a run and for hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from na_lora_lightning.core.controller import GateController


def describe_run(trainer: Trainer, pl_module: LightningModule, controller: GateController) -> dict[str, Any]:
    """What was trained, on what and how, as plain values."""
    mechanisms = {each.name: asdict(each.options) for each in controller.mechanisms}
    owners = (pl_module, getattr(trainer, "datamodule", None))
    module, data = (dict(getattr(owner, "hparams", None) or {}) for owner in owners)
    peft: Any = next((each.peft_config for each in pl_module.modules() if hasattr(each, "peft_config")), {})
    lora: dict[str, Any] = (
        next((dict(vars(config)) for config in peft.values()), {}) if isinstance(peft, Mapping) else {}
    )
    options = {
        **_flat({"model": module.get("model_name_or_path") or lora.get("base_model_name_or_path")}),
        **_flat({"lora": {name: lora.get(name) for name in ("r", "lora_alpha", "lora_dropout", "use_dora")}}),
        **_flat({name: value for name, value in module.items() if name not in ("model_name_or_path", "adapter")}),
        **_flat({"data": data}),
        **_flat({f"gates.{name}": values for name, values in mechanisms.items()}),
        **_flat({"gates.observer": asdict(controller.observer.options)}),
    }
    return {
        "model": options.get("model"),
        "options": options,
        "parameters": {
            "trainable": sum(each.numel() for each in pl_module.parameters() if each.requires_grad),
            "total": sum(each.numel() for each in pl_module.parameters()),
        },
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted names; without what was not set."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple, set, frozenset)):
            found[f"{prefix}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            found[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
