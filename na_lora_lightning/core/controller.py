"""One controller per model: it joins the observer, the two mechanisms and the optimizer.

It is all that a plain PyTorch loop needs::

    controller = GateController(peft_model, discover_gates(peft_model).require())
    controller.set_importance(ImportanceOptions(keep_fraction=0.5))
    controller.attach([optimizer])
    ...  # train as usual
    controller.detach()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.core.discovery import root_of
from na_lora_lightning.core.importance import ImportanceOptions, ResponsivenessCollector, TemporalImportance
from na_lora_lightning.core.lora_layers import is_on_parameter
from na_lora_lightning.core.misalignment import MisalignmentMeter
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.core.statistics import GateObserver, Layout, ObserverOptions
from na_lora_lightning.core.step_scale import RegimeCollector, StepScale, StepScaleOptions
from na_lora_lightning.core.update import GradientMask, RowUpdate
from na_lora_lightning.errors import ConfigurationError, UpdateError

_IMPORTANCE, _STEP_SCALE = "importance", "step_scale"


class GateController:
    """Observes the gates of a model and corrects the updates of their LoRA rows.

    Args:
        model: The PEFT model (or a module that holds LoRA layers), on its final device.
        gates: What :func:`~na_lora_lightning.core.discovery.discover_gates` found in it.
        observer_options: What the observer looks at.
        reduce: Adds a tensor over all processes in place; None for one process.

    Attributes:
        importance: Mechanism one, when set.
        step_scale: Mechanism two, when set.
        steps: Optimizer steps since :meth:`attach`.
        misalignment: Result of the last measured step: mean |Δρ| ``[sites]`` and squared norms ``[2, sites]``.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: GateMap,
        observer_options: ObserverOptions | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.gates = gates
        self.observer = GateObserver(root_of(model), gates.sites, observer_options or ObserverOptions())
        self.meter = MisalignmentMeter(self.observer)
        self.layout = Layout([(site.networks, site.channels) for site in gates.sites], self.observer.device)
        self.importance: TemporalImportance | None = None
        self.step_scale: StepScale | None = None
        self.misalignment: tuple[Tensor, Tensor] | None = None
        self.steps = 0
        self._reduce = reduce
        self._update = RowUpdate(gates.sites, self.layout)
        self._gradient_mask: GradientMask | None = None
        self._handles: list[Any] = []
        self._stepped = False

    def set_importance(self, options: ImportanceOptions) -> TemporalImportance:
        """Turns the temporal-importance mask on; before :meth:`attach`.

        Raises:
            ConfigurationError: It is on already, the criterion cannot rank the channels of an activation, or an option
                does not work for a site.
        """
        self._require_new(self.importance, "temporal-importance mask")
        options.check_activations(self.gates.sites)
        on_parameters = [site.name for site in self.gates.sites if is_on_parameter(site.lora_layer)]
        if options.mask_gradient_to_a and on_parameters:
            raise ConfigurationError(
                f"mask_gradient_to_a does not work for {on_parameters[0]!r}, whose LoRA is on a parameter, so that the "
                "gradient of A cannot be told from that of B; set it to False."
            )
        layout = self.observer.add(_IMPORTANCE, ResponsivenessCollector(options.criterion, options.signed))
        self.importance = TemporalImportance(options, layout)
        if options.mask_gradient_to_a:
            self._gradient_mask = GradientMask(self.gates.sites, self.layout)
        return self.importance

    def set_step_scale(self, options: StepScaleOptions) -> StepScale:
        """Turns the step scale on; before :meth:`attach`.

        Raises:
            ConfigurationError: It is on already, or would be exactly 1 for every gate.
        """
        self._require_new(self.step_scale, "step scale")
        options.check_activations(self.gates.sites)
        layout = self.observer.add(_STEP_SCALE, RegimeCollector(options.tau, options.granularity == "channel"))
        self.step_scale = StepScale(options, self.gates.sites, layout)
        return self.step_scale

    def _require_new(self, mechanism: object, name: str) -> None:
        if mechanism is not None:
            raise ConfigurationError(f"the {name} is set twice for one model; keep one of the two callbacks.")
        if self._handles:
            raise ConfigurationError(f"the {name} is set after training began; set it before attach().")

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on the model and the optimizer."""
        return bool(self._handles)

    @property
    def weights(self) -> Tensor:
        """m·η of each channel of all sites, ``[channels]`` float32."""
        weights = torch.ones(self.layout.total, device=self.observer.device)
        if self.importance is not None and self.importance.is_active:
            weights = weights * self.importance.weights
        if self.step_scale is not None and self.step_scale.is_active:
            scale = self.step_scale.scale
            weights = weights * (scale if scale.numel() == weights.numel() else self.layout.spread(scale))
        return weights

    def optimizer_of_gates(self, optimizers: Iterable[Optimizer]) -> Optimizer:
        """Finds the optimizer that holds every LoRA row parameter of the gates.

        Raises:
            UpdateError: None does, some rows are in none, or they are spread over several optimizers.
        """
        optimizers = list(optimizers)
        holders: dict[int, Optimizer] = {}
        missing: list[str] = []
        owner_of = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        for site in self.gates.sites:
            for entry in site.parameters():
                owner = owner_of.get(id(entry.parameter))
                if owner is None:
                    missing.append(entry.name)
                else:
                    holders[id(owner)] = owner
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UpdateError(
                f"no optimizer holds {', '.join(missing[:3])}{more}, so the update of these gates cannot be masked; "
                "give the optimizer all trainable LoRA parameters, and use a strategy that keeps the model's own "
                "parameters (not DeepSpeed)."
            )
        if len(holders) > 1:
            raise UpdateError(
                f"the gates' LoRA rows are spread over {len(holders)} optimizers, whose steps have no common moment "
                "for one mask; put all LoRA parameters into one optimizer (parameter groups are fine)."
            )
        return next(iter(holders.values()))

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Registers the hooks on the model and on the optimizer that holds the gates' rows.

        Raises:
            UpdateError: The update cannot be reached.
            ConfigurationError: No mechanism is set.
        """
        if self.importance is None and self.step_scale is None:
            raise ConfigurationError(
                "no mechanism is set, so training would be plain LoRA; call set_importance() or set_step_scale() first."
            )
        optimizer = self.optimizer_of_gates(optimizers)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # The meter's hooks on lora_B must exist before a pre-activation is observed; order does not matter further.
        self.meter.attach()
        self.observer.attach()
        if self._gradient_mask is not None:
            self._gradient_mask.attach()
            self._share_mask()

    def detach(self) -> None:
        """Removes every hook from the model and the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.observer.detach()
        self.meter.detach()
        if self._gradient_mask is not None:
            self._gradient_mask.detach()

    def discard_unstepped(self) -> None:
        """At the end of a step: forgets its statistics if the optimizer did not step (a skipped fp16 step)."""
        if not self._stepped:
            self.observer.reset()
            self.meter.reset()
        self._stepped = False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._update.remember()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        statistics = self.observer.finish_step(self._reduce)
        self.misalignment = self.meter.finish_step(self._reduce)
        self.steps += 1
        self._stepped = True
        if self.steps == 1:
            self.observer.require_fired(next(iter(statistics.values())).tokens)
        active = False
        if self.importance is not None:
            self.importance.update(statistics[_IMPORTANCE])
            active |= self.importance.is_active
        if self.step_scale is not None:
            self.step_scale.update(statistics[_STEP_SCALE])
            active |= self.step_scale.is_active
        if active:
            self._update.correct(self.weights)
        self._share_mask()

    def _share_mask(self) -> None:
        if self._gradient_mask is not None and self.importance is not None and self.importance.is_active:
            self._gradient_mask.weights = self.importance.weights
