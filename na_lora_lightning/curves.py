"""What the curves of the gates are called and what they mean, for TensorBoard, the report and the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A group of curves, one for each gate site.

    Attributes:
        group: Its name, before the ``/`` of the curves by layer.
        title: What people call it.
        meaning: What it measures, in one sentence.
        when_high: How to read a high value, or a layer that stands out.
        colours: Colour map of its heat map; None where it has none.
    """

    group: str
    title: str
    meaning: str
    when_high: str
    colours: str | None = None


_CURVES = (
    Curve(
        "selection_misalignment",
        "Selection misalignment",
        "Mean change of the selection weight ρ by the adapter, |ρ(g+δ) − ρ(g)|, over channels and tokens.",
        "LoRA changes which channels are selected, not only what they carry. 0 is the base model's selection. A higher "
        "learning rate raises it in all layers; measure text that is not of the task beside it.",
        "magma",
    ),
    Curve(
        "selection_share",
        "Selection share",
        "Share of what the adapter changes in a gate's output that is selection and not feature, from 0 to 1.",
        "Above one half the adapter acts through the selection of channels more than through what they carry.",
        "cividis",
    ),
    Curve(
        "gate_responsiveness",
        "Responsiveness",
        "Mean slope |φ'| of the activation (or another criterion, where one was chosen) over channels and real tokens.",
        "The gates still react to changes of their input. Near 0 they are shut, and their LoRA rows can change little.",
        "viridis",
    ),
    Curve(
        "gate_regime_suppressed",
        "Suppressed regime",
        "Share of the activation mass |φ| where the effective homogeneity E = zφ'(z)/φ(z) is negative.",
        "Much of what the layer passes on comes from the side where the activation turns down.",
        "Blues",
    ),
    Curve(
        "gate_regime_homogeneous",
        "Homogeneous regime",
        "Share of the activation mass |φ| where |E − 1| ≤ τ, so that the gate is nearly linear.",
        "Most of what the layer passes on is nearly linear in its input; LoRA then changes features most.",
        "Greens",
    ),
    Curve(
        "gate_regime_transitional",
        "Transitional regime",
        "Share of the activation mass between the suppressed and the homogeneous regime: what is left of 1.",
        "Most of what the layer passes on is where slope and selection change fastest.",
    ),
    Curve(
        "gate_mask_churn",
        "Mask churn",
        "Share of rows that the last refresh of the mask began or ceased to hold.",
        "The ranking of the channels has not settled: more steps between refreshes, or a larger β, make it steadier.",
        "Purples",
    ),
    Curve(
        "gate_mask_density",
        "Mask density",
        "Share of rows of lora_B that are updated.",
        "1 means that no row is held: before the first mask, or with keep_fraction 1.",
    ),
    Curve(
        "gate_step_scale",
        "Step scale",
        "Factor η on the step of lora_B, mean over channels.",
        "1 is plain LoRA's step; below, steps are shorter where E is far from 1.",
    ),
    Curve(
        "gate_step_scale_deviation",
        "Deviation of the step scale",
        "Standard deviation over channels of the factor η on the step of lora_B.",
        "The channels of a layer take steps of different length; 0 is plain LoRA.",
    ),
)
CURVES = {curve.group: curve for curve in _CURVES}
HEAT_MAPS = tuple(curve for curve in _CURVES if curve.colours is not None)


def overview_tag(group: str) -> str:
    """The tag of a group's curve over all layers: ``gates/responsiveness`` of ``gate_responsiveness``."""
    return f"gates/{group.removeprefix('gate_')}"


def group_of_tag(tag: str) -> str | None:
    """The group of a curve by its tag, over all layers or of one; None for a curve that is not of the gates."""
    prefix, _, rest = tag.partition("/")
    if prefix == "gates":
        name = rest.partition("/")[0]
        return next((group for group in CURVES if group.removeprefix("gate_") == name), None)
    return prefix if prefix in CURVES else None
