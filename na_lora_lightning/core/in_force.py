"""What is in force in a training: one line when it begins, and warnings where that is nothing.

The line goes to the logger ``na_lora_lightning``, so that it is silenced and redirected as any other::

    logging.getLogger("na_lora_lightning").setLevel(logging.WARNING)
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter

import torch

from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.mechanism_set import MechanismSet
from na_lora_lightning.core.mechanisms.step_scale_options import has_partition
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.errors import PlainLoRAWarning

_log = logging.getLogger("na_lora_lightning")
if _log.level == logging.NOTSET:
    # Otherwise the root logger's level hides the line from everybody who has not set up logging.
    _log.setLevel(logging.INFO)

_HELD_BY_CONTROL = {"none": "the least responsive", "reversed": "the most responsive", "random": "a random"}
_WEIGHTED_BY_CONTROL = {"none": "by responsiveness", "reversed": "against responsiveness", "random": "at random"}


def say(line: str) -> None:
    """Logs a line once for all processes; to standard error where nobody has set up logging."""
    if not _is_first_process() or not _log.isEnabledFor(logging.INFO):
        return
    if _log.hasHandlers():
        _log.info(line)
        return
    handler = logging.StreamHandler()
    _log.addHandler(handler)
    try:
        _log.info(line)
    finally:
        # What is set up later is not to find it here, and print lines twice.
        _log.removeHandler(handler)


def warn(sentence: str) -> None:
    """Warns once for all processes that something trains as plain LoRA."""
    if _is_first_process():
        warnings.warn(sentence, PlainLoRAWarning, stacklevel=2)


def _is_first_process() -> bool:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    # Processes that were started together, and have not joined yet.
    return os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0") == "0"


def describe(gates: GateMap, mechanisms: MechanismSet) -> str:
    """What is in force, in one line: gates and channels, what is held or scaled, and from which step."""
    parts = [_gates(gates), _mask(mechanisms.importance), _scale(gates, mechanisms)]
    if mechanisms.are_neutral:
        parts.append("plain LoRA, watched")
    steps = max((mechanism.steps for mechanism in mechanisms), default=0)
    if steps:
        parts.append(f"resuming at step {steps + 1}")
    return f"NA-LoRA: {'; '.join(parts)}."


def _gates(gates: GateMap) -> str:
    kinds = Counter((site.part, site.activation.name, site.experts.count if site.experts else 0) for site in gates)
    several_parts = len({part for part, _, _ in kinds}) > 1
    names = []
    for (part, activation, experts), count in kinds.items():
        name = f"{count} {activation} gate{'' if count == 1 else 's'}"
        name += f" of {experts} experts" if experts else ""
        names.append(f"{name} in {part or 'the rest'}" if several_parts else name)
    text = f"{', '.join(names)}, {gates.channels:,} channels"
    bare = sum(entry.gate_without_lora for entry in gates.left_out)
    unmapped = sum(entry.not_supported for entry in gates.left_out)
    untold = sum(entry.may_be_gate for entry in gates.left_out)
    text += f" ({_count(bare, 'gate')} without LoRA left out)" if bare else ""
    text += f" ({_count(unmapped, 'gate')} with LoRA not masked: plain LoRA)" if unmapped else ""
    return text + (f" ({_count(untold, 'function')} of unknown form behind LoRA: plain LoRA)" if untold else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _mask(importance: TemporalImportance | None) -> str:
    if importance is None:
        return "no mask"
    options = importance.options
    first = importance.first_mask()
    if importance.options.is_neutral:
        return "no row held (keep_fraction 1)"
    if first is None:
        return f"no row held (keep_fraction {options.keep_fraction:g} rounds to all channels)"
    when = f"{'since' if importance.is_active else 'from'} step {first}"
    if options.selection == "soft":
        text = f"steps of rows weighted {_WEIGHTED_BY_CONTROL[options.control]} {when}"
    elif options.selection == "threshold":
        text = f"{_below_threshold(options)} held {when}"
    else:
        text = f"{_least(importance)} held {when}"
    return text + (", the gradient of A masked too" if options.mask_gradient_to_a else "")


def _below_threshold(options: ImportanceOptions) -> str:
    scores = "random scores" if options.control == "random" else "responsiveness"
    side = "above" if options.control == "reversed" else "below"
    return f"rows {side} {options.threshold:g} times the mean of {scores}"


def _least(importance: TemporalImportance) -> str:
    options = importance.options
    end, start = 1 - options.keep_fraction, options.keep_fraction_start
    moving = start is not None and start != options.keep_fraction
    share = f"{_percent(1 - (start or 0.0))}" if moving else _percent(end)
    text = f"rows of {_HELD_BY_CONTROL[options.control]} {share}"
    text += " of all gates together" if options.scope == "global" and len(importance.layout.sizes) > 1 else ""
    if moving:
        return f"{text} (moving to {_percent(end)} by step {options.warmup_steps + 1 + options.keep_fraction_steps})"
    return f"{text} ({importance.held_count(options.keep_fraction):,})"


def _scale(gates: GateMap, mechanisms: MechanismSet) -> str:
    scale = mechanisms.step_scale
    if scale is None:
        return "no step scale"
    options, sites = scale.options, gates.sites
    text = f"step scale by {options.granularity}"
    if options.eta_min == 1.0:
        text = "step scale exactly 1 (eta_min 1)"
    elif options.cancels_out(sites) or not any(map(has_partition, sites)):
        text = "step scale exactly 1"
    elif not options.normalize:
        text += ", not normalised"
    scaled = text.startswith("step scale by")
    unscaled = sorted({site.activation.name for site in sites if not has_partition(site)})
    text += f" (1 for {', '.join(unscaled)})" if scaled and unscaled else ""
    return text + (f", steps of A times {options.matrix_a_factor:g}" if options.matrix_a_factor != 1.0 else "")


def warn_before(gates: GateMap, mechanisms: MechanismSet, steps_left: float | None) -> bool:
    """Warns of a mask that will hold no row in the steps that are planned.

    Args:
        gates: The gates of the model.
        mechanisms: What is on.
        steps_left: Optimizer steps that are planned; None where that is not known.

    Returns:
        Whether there was reason to.
    """
    importance, scale = mechanisms.importance, mechanisms.step_scale
    if scale is not None and scale.options.cancels_out(gates.sites):
        warn(
            "normalize with granularity 'site' makes the step scale exactly 1, because each activation has one gate "
            "alone; use granularity 'channel', or normalize=False."
        )
    if importance is None or importance.options.is_neutral:
        return False
    options, first = importance.options, importance.first_mask()
    if first is None:
        sizes = sorted(set(importance.scope_sizes))
        warn(
            f"keep_fraction {options.keep_fraction:g} of {' or '.join(map(str, sizes))} gate channels rounds to all of "
            f"them, so no row is ever held and {_remaining(mechanisms)}; lower keep_fraction, rank over all gates "
            "(scope='global'), or set keep_fraction to 1 to watch only."
        )
        return True
    if steps_left is None or importance.has_acted:
        return False
    last = importance.steps + steps_left
    if last >= first:
        return False
    reason = f"warm-up of {options.warmup_steps}"
    if first > options.warmup_steps + 1:
        reason += " and the schedule of the keep fraction"
    warn(
        f"training is planned to end at optimizer step {last:g} and the mask holds no row before step {first} "
        f"({reason}), so {_remaining(mechanisms)}; lower warmup_steps or train longer."
    )
    return True


def _remaining(mechanisms: MechanismSet) -> str:
    """What is left of the method without a mask."""
    return "this is plain LoRA" if mechanisms.step_scale is None else "the step scale alone acts"


def warn_after(gates: GateMap, mechanisms: MechanismSet, trained: bool, warned_before: bool) -> None:
    """Warns, at the end of a training, of what never acted in it.

    Args:
        gates: The gates of the model.
        mechanisms: What was on.
        trained: Whether any row of a gate got a gradient.
        warned_before: What :func:`warn_before` returned.
    """
    if not trained:
        warn(
            "no LoRA row of the gates got a gradient in this training, so none was trained; leave them unfrozen, and "
            "with gradient checkpointing call enable_input_require_grads() on the model."
        )
        return
    importance, scale = mechanisms.importance, mechanisms.step_scale
    if importance is not None and not importance.options.is_neutral and not importance.has_acted and not warned_before:
        warn(
            f"training ended at optimizer step {importance.steps} and no row had been held by then (warm-up of "
            f"{importance.options.warmup_steps}), so {_was_left(mechanisms)}; lower warmup_steps or train longer."
            if not importance.is_active
            else f"no row was held in {importance.steps} optimizer steps, because no mask left one out, so "
            f"{_was_left(mechanisms)}; keep fewer rows."
        )
    if scale is not None and not scale.has_acted and not scale.options.is_neutral:
        warn(
            f"the step scale was exactly 1 in all of {scale.steps} optimizer steps, because at no gate two regimes "
            "held 5 % of the activation mass, so it changed nothing; leave it out, or lower its tau."
        )
    if not mechanisms.are_neutral:
        _warn_of_silent(gates, mechanisms)


def _was_left(mechanisms: MechanismSet) -> str:
    return "this was plain LoRA" if mechanisms.step_scale is None else "no more than the step scale acted"


def _warn_of_silent(gates: GateMap, mechanisms: MechanismSet) -> None:
    seen = [mechanism.seen for mechanism in mechanisms]
    silent = (~torch.stack(seen).any(dim=0)).tolist()
    if not any(silent):
        return
    names, end = [], 0
    for site in gates:
        start, end = end, end + site.networks
        if any(silent[start:end]):
            names.append(_silent_name(site, silent[start:end]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warn(
        f"{', '.join(names[:3])}{more} saw no token in this training, so their rows were neither held nor scaled; "
        "train longer, look at more tokens (observer.max_tokens), or take them out of the LoRA targets."
    )


def _silent_name(site: GateSite, silent: list[bool]) -> str:
    return site.name if site.experts is None else f"{sum(silent)} of {site.networks} experts of {site.name}"
