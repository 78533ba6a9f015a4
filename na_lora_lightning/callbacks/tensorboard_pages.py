"""What TensorBoard has beside curves: their layout and descriptions, a text about them, hyper-parameters, samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from na_lora_lightning.curves import CURVES, group_of_tag, overview_tag

_RIGHT = ("contains_match", "exact_match", "token_accuracy", "accuracy")
# Of a text that somebody else wrote.
_LONGEST = 400


class TensorBoardPages:
    """Writes the pages of one run, at its start.

    Args:
        logger: TensorBoard's.
        options: Hyper-parameters by name.
        metrics: Names of the metrics that the module logs; none where it does not say.
        tags: Tags of the curves over all layers.
    """

    def __init__(self, logger: Any, options: Mapping[str, Any], metrics: Sequence[str], tags: Sequence[str]) -> None:
        self._experiment = logger.experiment
        self._described: set[str] = set()
        self._write_options(options, [*metrics, *tags])
        self._experiment.add_custom_scalars(_layout(metrics))
        self._experiment.add_text("gates/what the curves mean", explanation(), 0)

    def describe(self, curves: Iterable[str]) -> None:
        """Gives each curve a description before its first point."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        values = []
        for tag in curves:
            group = group_of_tag(tag)
            if tag in self._described or group is None:
                continue
            self._described.add(tag)
            curve = CURVES[group]
            metadata = SummaryMetadata(
                summary_description=f"{curve.meaning} When it is high: {curve.when_high}",
                plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
            )
            # Without a value, so that no point is added.
            values.append(Summary.Value(tag=tag, metadata=metadata))
        if values:
            self._writer.add_summary(Summary(value=values), 0)

    def show_samples(self, samples: Iterable[Mapping[str, Any]], step: int) -> None:
        """Writes answers to prompts as a table."""
        rows = "\n".join(
            f"| {_cell(sample['prompt'])} | {_cell(sample['reference'])} | {_cell(sample['answer'])} |"
            for sample in samples
        )
        self._experiment.add_text("samples", f"| prompt | reference | answer |\n|---|---|---|\n{rows}", step)

    @property
    def _writer(self) -> Any:
        return self._experiment._get_file_writer()

    def _write_options(self, options: Mapping[str, Any], metrics: Iterable[str]) -> None:
        # TensorBoard takes the last point of each metric itself, so the values that are asked for here say nothing.
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in options.items()
        }
        experiment, start, _ = hparams(plain, dict.fromkeys(metrics, 0))
        for summary in (experiment, start):
            self._writer.add_summary(summary)


def _layout(metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    losses = [name for name in metrics if name.endswith("loss")] or [".*loss.*"]
    answers = [name for name in metrics if name.rpartition("/")[2] in _RIGHT]
    training = {"loss": ["Multiline", losses]}
    if answers:
        training["right answers"] = ["Multiline", answers]
    groups = {
        "How far the adapter moves the selection": ("selection_misalignment",),
        "Share of selection in what it changes": ("selection_share",),
        "Responsiveness": ("gate_responsiveness",),
        "Regimes": ("gate_regime_suppressed", "gate_regime_homogeneous"),
        "Mask": ("gate_mask_churn", "gate_mask_density"),
        "Step scale": ("gate_step_scale", "gate_step_scale_deviation"),
    }
    gates = {title: ["Multiline", [f"^{overview_tag(each)}(/.*)?$" for each in own]] for title, own in groups.items()}
    layers = {
        CURVES[group].title: ["Multiline", [f"^{group}/.*"]]
        for group in ("selection_misalignment", "selection_share", "gate_responsiveness")
    }
    return {"Training": training, "Gates, over all layers": gates, "Gates by layer (view.layer_curves)": layers}


def explanation() -> str:
    """What each curve means, as Markdown."""
    # No table: TensorBoard makes its first column so narrow that names are broken anywhere.
    lines = [
        "Each curve `gates/…` is a mean over all layers, weighted by channels; by activation where there are several. "
        "Layers are in pictures (IMAGES), in `na-lora report`, and with `view.layer_curves` in curves of their own.",
        "",
    ]
    lines += [
        f"- **{overview_tag(curve.group)}**: {curve.meaning} *When it is high:* {curve.when_high}"
        for curve in CURVES.values()
    ]
    return "\n".join(lines)


def _cell(text: Any) -> str:
    flat = " ".join(str(text).split())
    flat = flat if len(flat) <= _LONGEST else f"…{flat[1 - _LONGEST :]}"
    # Markdown that somebody else wrote is shown as it is written.
    escaped = escape(flat, quote=False)
    return "".join(f"&#{ord(letter)};" if letter in "|`*_[]()!\\~#<>" else letter for letter in escaped)
