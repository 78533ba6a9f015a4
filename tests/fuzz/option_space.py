"""Random options of ``na-lora fit``, some of which contradict each other on purpose."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

Values = list[Any]

# By how many parts of a hundred an option that is listed here is set at all.
_SET = 30

_LISTS = {
    "llama": (["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], ["gate_proj"], ["up_proj", "down_proj"]),
    "gpt2": (["c_attn", "c_fc", "c_proj"], ["c_fc"], ["c_attn"]),
    "mixtral": (["q_proj", "v_proj"], ["o_proj"], ["k_proj"]),
}
_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2}),
    ("AdamW", {"lr": 1e-3, "weight_decay": 0.5, "amsgrad": True}),
    ("AdamW", {"lr": 1e-3, "fused": True}),
    ("AdamW", {"lr": 1e-3, "capturable": True}),
    ("Adam", {"lr": 1e-3, "foreach": True}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 1e-2}),
    ("Adafactor", {"lr": 1e-3}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.9}),
    ("Adamax", {"lr": 1e-3}),
    ("NAdam", {"lr": 1e-3}),
    ("RAdam", {"lr": 1e-3}),
    ("Adagrad", {"lr": 1e-3}),
    ("Adadelta", {"lr": 1e-1}),
    ("ASGD", {"lr": 1e-3}),
    ("Rprop", {"lr": 1e-3}),
    ("LBFGS", {"lr": 1e-1, "max_iter": 2}),
    ("Muon", {"lr": 1e-3}),
    ("SparseAdam", {"lr": 1e-3}),
]
_OBSERVER: dict[str, Values] = {
    "max_tokens": [1, 5, 128, None, 0],
    "exclude_prompt": [True, False],
    "allow_silent_sites": [True, False],
}
_GROUPS: dict[str, dict[str, Values]] = {
    "model.lora": {
        "r": [1, 2, 4, 8, 8, 40, 0],
        "alpha": [1, 4, 32.0, 0],
        "dropout": [0.0, 0.1, 0.5, 1.0],
        "layers_to_transform": [[0], [1], [0, 1], [7], []],
        "bias": ["none", "all", "lora_only"],
        "use_rslora": [True, False],
        "use_dora": [True, False],
        "layers": ["fast", "peft", "slow"],
        "trainable_token_indices": [None, [], [1, 2], [99999]],
        "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "orthogonal", "eva"],
    },
    "model.schedule": {
        "name": [
            "linear",
            "cosine",
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "warmup_stable_decay",
            "torch.optim.lr_scheduler.OneCycleLR",
            "torch.optim.lr_scheduler.StepLR",
            "torch.optim.lr_scheduler.ReduceLROnPlateau",
            "transformers.get_linear_schedule_with_warmup",
            "torch.optim.lr_scheduler.Step",
        ],
        "interval": ["step", "step", "epoch"],
        "monitor": [None, None, None, "train/loss", "validation/loss", "val_loss"],
        "warmup_fraction": [0.0, 0.1, 0.5, 1.0],
        "warmup_steps": [None, 0, 1, 50],
        "options": [
            {},
            {"num_cycles": 2},
            {"min_lr_rate": 0.1},
            {"num_decay_steps": 2},
            {"max_lr": 0.1},
            {"step_size": 2},
        ],
    },
    "model.loss": {
        "logits": ["targets", "all"],
        "average_over": ["step", "micro_batch"],
        "on_nonfinite": ["stop", "skip"],
    },
    "model.evaluation": {
        "generate": [True, False],
        "sample_count": [None, 1, 2, 100, 0],
        "max_new_tokens": [1, 3, 200],
        "num_beams": [1, 2],
        "answer_pattern": [None, r"\d+", "("],
        "ignore_case": [True, False],
    },
    "model": {
        "dtype": ["auto", "float32", "bfloat16", "float16"],
        "attention_implementation": [None, "eager", "sdpa", "flash_attention_2", "nonsense"],
        "gradient_checkpointing": [True, False],
    },
    "data": {
        "batch_size": [1, 2, 3, 8, 100, 0],
        "validation_batch_size": [None, 1, 3],
        "max_length": [4, 8, 1024],
        "loss_on": ["completion", "all"],
        "use_chat_template": [None, False, True],
        "system_prompt": [None, None, "Be brief."],
        "shuffle": [True, False],
        "group_by_length": [True, False],
        "pad_to_multiple_of": [1, 8, 0],
        "num_workers": [0],
        "seed": [0, 1, 2**31],
    },
    "trainer": {
        "accumulate_grad_batches": [1, 2, 3, 100, 0],
        "precision": ["32-true", "32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true", "64-true"],
        "gradient_clip_val": [None, 0.1, 1.0, 0],
        "gradient_clip_algorithm": ["norm", "value", "other"],
        "val_check_interval": [1.0, 0.5, 1, 2, 1000],
        "check_val_every_n_epoch": [1, 2, None],
        "limit_train_batches": [1.0, 0.5, 1, 3, 0],
        "limit_val_batches": [1.0, 0, 1],
        "num_sanity_val_steps": [0, 1, -1],
        "log_every_n_steps": [1, 2, 50, 0],
        "overfit_batches": [0.0, 1, 0.5],
        "deterministic": [True, False],
        "inference_mode": [True, False],
        "detect_anomaly": [True, False],
        "enable_checkpointing": [True, False],
        "max_time": [None, "00:00:10:00"],
        "min_steps": [1, 3],
        "reload_dataloaders_every_n_epochs": [0, 1],
    },
    "gate_importance": {
        "enabled": [True, True, False],
        "keep_fraction": [0.1, 0.5, 0.9, 0.99, 1.0, 0.0],
        "beta": [0.0, 0.5, 0.9, 1.0],
        "criterion": ["selection_derivative", "output_derivative", "homogeneity_gap", "output_derivative_change"],
        "scope": ["site", "global"],
        "warmup_steps": [0, 0, 1, 2, 100],
        "refresh_every": [1, 1, 2, 10, 0],
        "histogram_every_n_steps": [0, 1, 100],
        "allow_unmasked_gates": [True, True, False],
    },
    "gate_importance.variant": {
        "signed": [True, False],
        "selection": ["top_k", "top_k", "threshold", "soft"],
        "threshold": [0.1, 0.5, 1.5, 0.0],
        "keep_fraction_start": [None, 1.0, 0.3],
        "keep_fraction_steps": [1, 3, 0],
        "mask_gradient_to_a": [True, False],
        "control": ["none", "none", "random", "reversed"],
        "seed": [0, 1],
    },
    "step_scale": {
        "enabled": [True, False, False],
        "granularity": ["activation", "site", "channel"],
        "tau": [0.01, 0.1, 0.9, 0.0],
        "eta_min": [0.01, 0.5, 1.0, 0.0],
        "normalize": [True, False],
        "beta": [0.0, 0.9],
        "matrix_a_factor": [1.0, 0.25, 0.0, 2.0],
        "allow_unmasked_gates": [True, False],
    },
    "checkpoint": {"every_n_steps": [0, 1, 2], "keep": [1, 2, 3, 0], "enabled": [True, True, False]},
    "fit_summary": {"sample_count": [0, 1, 3, -1], "enabled": [True, False]},
}


@dataclass
class Combination:
    """Options by their dotted names.

    Attributes:
        number: Which of all it is.
        kind: The model: ``"llama"``, ``"gpt2"`` or ``"mixtral"``.
        options: Option by dotted name.
        flags: Those that are given on the command line, and not in the configuration file.
    """

    number: int
    kind: str
    options: dict[str, Any]
    flags: list[str] = field(default_factory=list)

    def get(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    @property
    def only_watches(self) -> bool:
        """Whether the mask is on and asked to keep everything, and no step is scaled."""
        neutral = self.get("gate_importance.keep_fraction", 0.9) == 1.0
        neutral &= self.get("gate_importance.variant.selection", "top_k") == "top_k"
        neutral &= self.get("gate_importance.variant.keep_fraction_start", None) in (None, 1.0)
        return neutral and self.get("gate_importance.enabled", True) and not self.get("step_scale.enabled", True)

    def arguments(self, config: Path, **overrides: Any) -> list[str]:
        """The command line, whose configuration is written to ``config``."""
        options = {**self.options, **overrides}
        nested: dict[str, Any] = {}
        arguments = ["fit", "--config", str(config)]
        for name, value in options.items():
            if name in self.flags and name not in overrides:
                text = value if isinstance(value, str) else json.dumps(value)
                arguments += [f"--{name}", text]
                continue
            *path, last = name.split(".")
            group = nested
            for part in path:
                group = group.setdefault(part, {})
            group[last] = value
        config.write_text(yaml.safe_dump(nested), encoding="utf-8")
        return arguments


def draw(number: int, seed: int, kinds: dict[str, str], train: str, folder: Path) -> Combination:
    """Combination ``number`` of a seed.

    Args:
        number: Which one.
        seed: Of all combinations.
        kinds: Folder of the saved model by kind.
        train: The data file.
        folder: Where the run may write.
    """
    rng = Random(f"{seed}/{number}")
    kind = rng.choice(list(kinds))
    optimizer, init_args = rng.choice(_OPTIMIZERS)
    options: dict[str, Any] = {
        "model.model_name_or_path": kinds[kind],
        "model.lora.r": 2,
        "model.lora.alpha": 4,
        "model.optimizer": {"class_path": f"torch.optim.{optimizer}", "init_args": init_args},
        "data.train": train,
        "data.batch_size": 3,
        "gate_importance.warmup_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.default_root_dir": str(folder),
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.log_every_n_steps": 1,
        "trainer.max_epochs": 1,
        "trainer.callbacks": [{"class_path": "fuzz.option_checks.Spy"}],
    }
    if kind == "mixtral":
        options["model.lora.target_parameters"] = rng.choice(["all-experts", ["experts.gate_up_proj"]])
    if rng.random() < 0.8:
        options["data.validation"] = train
    for group, members in _GROUPS.items():
        # Half of the groups are left alone, so that not everything is odd at once.
        for name, values in members.items() if rng.random() < 0.5 else ():
            if rng.randrange(100) < _SET:
                # The last of several is the odd one.
                last = rng.random() < 0.05 or len(values) < 3
                options[f"{group}.{name}"] = rng.choice(values if last else values[:-1])
    _draw_observer(options, rng)
    _draw_targets(options, rng, kind)
    _draw_trainer(options, rng, folder)
    if rng.random() < 0.15:
        options |= {"gate_importance.keep_fraction": 1.0, "step_scale.enabled": False, "gate_importance.enabled": True}
    names = [name for name in options if name != "trainer.callbacks" and not isinstance(options[name], dict)]
    return Combination(number, kind, options, rng.sample(names, min(len(names), rng.randrange(6))))


def _draw_observer(options: dict[str, Any], rng: Random) -> None:
    if rng.random() < 0.2:
        group = rng.choice(["gate_importance", "step_scale"])
        name = rng.choice(list(_OBSERVER))
        options[f"{group}.observer.{name}"] = rng.choice(_OBSERVER[name])


def _draw_targets(options: dict[str, Any], rng: Random, kind: str) -> None:
    if rng.random() < 0.4:
        options["model.lora.target_modules"] = rng.choice(
            [*_LISTS[kind] * 4, *["all-linear"] * 4, r".*\.0\.(mlp|self_attn|attn)\..*", ["nothing"]]
        )
    if rng.random() < 0.1:
        options["model.lora.exclude_modules"] = rng.choice([["q_proj"], "down_proj", "lm_head"])
    if rng.random() < 0.1:
        options["model.lora.modules_to_save"] = rng.choice(
            [["lm_head"], ["lm_head"], ["embed_tokens"], ["wte"], ["nothing"]]
        )
    if rng.random() < 0.1:
        options["model.lora.rank_pattern"] = rng.choice([{"gate_proj": 1}, {"c_fc": 3}, {"nothing": 2}])
    if rng.random() < 0.1:
        options["model.lora.alpha_pattern"] = rng.choice([{"gate_proj": 1.0}, {"c_fc": 8}])


def _draw_trainer(options: dict[str, Any], rng: Random, folder: Path) -> None:
    options["trainer.logger"] = rng.choice(
        [False, False, True, {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}]
    )
    if rng.random() < 0.4:
        options["trainer.max_epochs"] = rng.choice([1, 2, 3, -1])
        if options["trainer.max_epochs"] == -1 or rng.random() < 0.3:
            options["trainer.max_steps"] = rng.choice([1, 2, 5])
    if rng.random() < 0.05:
        options["trainer.fast_dev_run"] = rng.choice([True, 2])
    if rng.random() < 0.4:
        options["model.adapter.write"] = rng.choice(["last", "each", "never", "fit_end"])
    if rng.random() < 0.2:
        options["model.adapter.folder"] = str(folder / "elsewhere")
