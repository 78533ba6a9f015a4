"""One controller per model: it joins the observer, the two mechanisms and the optimizer.

It is all that a plain PyTorch loop needs::

    controller = GateController(peft_model, discover_gates(peft_model).require())
    controller.set_importance(ImportanceOptions())
    controller.attach([optimizer])
    ...  # train as usual
    controller.detach()

:func:`~na_lora_lightning.plain_pytorch.nonlinearity_aware` does just that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.core.compilation import forget_graphs
from na_lora_lightning.core.in_force import describe, say, warn_after, warn_before
from na_lora_lightning.core.layout import Layout
from na_lora_lightning.core.lora_layers import LoRARows, is_on_parameter, is_product_of_modules
from na_lora_lightning.core.mechanisms.importance import ImportanceOptions, ResponsivenessCollector, TemporalImportance
from na_lora_lightning.core.mechanisms.metrics import as_floats, gate_metrics
from na_lora_lightning.core.mechanisms.saved_options import Changes, changed_options, in_words, saved_options
from na_lora_lightning.core.mechanisms.step_scale import RegimeCollector, StepScale, StepScaleOptions
from na_lora_lightning.core.model_entry import entrance_of, root_of
from na_lora_lightning.core.observation.misalignment import MisalignmentMeter
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions, StepStatistics
from na_lora_lightning.core.precision import single_precision
from na_lora_lightning.core.sharding import Shards, is_sharded
from na_lora_lightning.core.silent_sites import SilenceCheck
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.core.stepping.gradient_mask import GradientMask
from na_lora_lightning.core.stepping.optimizers import (
    StepCalls,
    only_first_evaluation,
    require_reachable,
    skips_by_itself,
    stepping_optimizer,
)
from na_lora_lightning.core.stepping.rows import RowUpdate
from na_lora_lightning.core.stepping.skipped_steps import Aside, GradientWatch
from na_lora_lightning.errors import ConfigurationError, UpdateError

_IMPORTANCE, _STEP_SCALE, _WATCHED = "importance", "step_scale", "watched"

# Optimizers whose steps are corrected: twice would be once too often.
_corrected: WeakSet[Optimizer] = WeakSet()


class GateController:
    """Observes the gates of a model and corrects the updates of their LoRA rows.

    Args:
        model: The PEFT model (or a module that holds LoRA layers), on its final device.
        gates: What :func:`~na_lora_lightning.core.discovery.gates.discover_gates` found in it.
        observer_options: What the observer looks at.
        reduce: Adds a tensor over all processes in place; None for one process.

    Attributes:
        importance: Mechanism one, when set.
        step_scale: Mechanism two, when set.
        steps: Optimizer steps so far, those before a resume included where :meth:`load_state_dict` was called.
        total_steps: What ``steps`` will be when training ends, where that is known.
        announced: Whether it was said what is in force.
        watched_scale: What the step scale would be by the last measured step alone, where rows are only watched.
        misalignment: Result of the last measured step: mean |Δρ| ``[sites]`` and squared norms ``[2, sites]``.
        gradients: Tells when gradients are thrown away without a step, and the statistics with them.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: GateMap,
        observer_options: ObserverOptions | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.gates = gates
        self._shards = Shards(model)
        self._shards.reshard()
        self._parameters: list[LoRARows] = []
        self._correct_too(entry for site in gates.sites for entry in site.parameters())
        self.observer = GateObserver(
            root_of(model), gates.sites, observer_options or ObserverOptions(), entrance_of(model)
        )
        self.meter = MisalignmentMeter(self.observer)
        self.layout = Layout([(site.networks, site.channels) for site in gates.sites], self.observer.device)
        self.importance: TemporalImportance | None = None
        self.step_scale: StepScale | None = None
        self.watched_scale: StepScale | None = None
        self.misalignment: tuple[Tensor, Tensor] | None = None
        self.steps = 0
        self.total_steps: float | None = None
        self.announced = False
        self._warned_before = False
        self._steps_when_attached = 0
        self._reduce = reduce
        self._update = RowUpdate.of_channels(gates.sites, self.layout)
        self._update_of_a: RowUpdate | None = None
        self._weight_of_a = torch.ones(1)
        self._watched: StepScaleOptions | None = None
        self._adapters = [site.adapters for site in gates.sites]
        self._gradient_mask: GradientMask | None = None
        self._handles: list[Any] = []
        self._optimizer: Optimizer | None = None
        self._stepped = False
        self._calls = StepCalls()
        self._aside = Aside()
        parameters = {id(rows.parameter): rows.parameter for site in gates.sites for rows in site.parameters()}
        self.gradients = GradientWatch(list(parameters.values()), self._aside.drop)
        self._silence = SilenceCheck(self.observer, self.gradients)
        self.observer.before_pass = self._before_pass

    def _correct_too(self, entries: Iterable[LoRARows]) -> None:
        for entry in entries:
            self._shards.require_gathered(entry.parameter, entry.name)
            self._parameters.append(entry)

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
        others = [
            site.name
            for site in self.gates.sites
            if not all(is_product_of_modules(site.lora_layer, adapter) for adapter in site.adapters)
        ]
        if options.mask_gradient_to_a and others:
            raise ConfigurationError(
                f"mask_gradient_to_a does not work for {others[0]!r}, whose adapter is not the product of two "
                "layers (AdaLoRA, or a variant of LoRA other than DoRA); set it to False."
            )
        sharded = [entry.name for entry in self._parameters if is_sharded(entry.parameter)]
        if options.mask_gradient_to_a and sharded:
            raise ConfigurationError(
                f"mask_gradient_to_a does not work for {sharded[0]!r}, which is sharded, so that no process has the "
                "whole gradient of A; set it to False, or use strategy='ddp'."
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
        if options.matrix_a_factor != 1.0:
            # Several sites may share a layer.
            entries = {id(entry.parameter): entry for site in self.gates.sites for entry in site.matrices_a()}
            self._correct_too(entries.values())
            self._update_of_a = RowUpdate.of_matrices(entries.values())
            self._weight_of_a = torch.full((1,), options.matrix_a_factor, device=self.observer.device)
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
            UpdateError: None does, some rows are in none, they are spread over several optimizers, or the optimizer
                moves parameters at other moments than its step.
        """
        outermost = {id(stepping_optimizer(optimizer)): optimizer for optimizer in optimizers}
        optimizers = [stepping_optimizer(optimizer) for optimizer in outermost.values()]
        holders: dict[int, Optimizer] = {}
        missing: list[str] = []
        owner_of = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        for entry in self._parameters:
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
        (found,) = holders.values()
        require_reachable(outermost[id(found)])
        return found

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Registers the hooks on the model and on the optimizer that holds the gates' rows.

        Raises:
            UpdateError: The update cannot be reached.
            ConfigurationError: No mechanism is set, or the optimizer's steps are corrected already.
        """
        if self.importance is None and self.step_scale is None:
            raise ConfigurationError(
                "no mechanism is set, so training would be plain LoRA; call set_importance() or set_step_scale() first."
            )
        optimizer = self.optimizer_of_gates(optimizers)
        if optimizer in _corrected:
            raise ConfigurationError(
                f"the steps of this {type(optimizer).__name__} are corrected by NA-LoRA already, and would be twice; "
                "keep one callback or one `with` block for both mechanisms, or detach() the earlier controller."
            )
        _corrected.add(optimizer)
        self._optimizer = optimizer
        self._steps_when_attached = self.steps
        self._watch_regimes()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # The meter's hooks on lora_B must exist before a pre-activation is observed; order does not matter further.
        self.meter.attach()
        self.observer.attach()
        self.gradients.attach()
        if self._gradient_mask is not None:
            self._gradient_mask.attach()
            self.share_gradient_mask()
        forget_graphs()

    def _watch_regimes(self) -> None:
        """Shows what the step scale would see, on measured steps, where rows are only watched."""
        if self._watched is None and self.step_scale is None and self.importance and self.importance.options.is_neutral:
            options = self._watched = StepScaleOptions(beta=0.0)
            self.observer.add(_WATCHED, RegimeCollector(options.tau, True), is_due=lambda: self.meter.enabled)

    def announce(self) -> None:
        """Says once what is in force, and warns where that will be nothing; by itself in the first forward pass."""
        if self.announced:
            return
        self.announced = True
        say(describe(self))
        self._warned_before = warn_before(self)

    def conclude(self) -> None:
        """Warns of what never acted, at the end of a training that ran its course; before :meth:`detach`."""
        if self.is_attached and self.steps > self._steps_when_attached:
            warn_after(self, self._warned_before)

    def detach(self) -> None:
        """Removes every hook from the model and the optimizer."""
        if self._handles:
            forget_graphs()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer is not None:
            _corrected.discard(self._optimizer)
        self._optimizer = None
        self.observer.detach()
        self.meter.detach()
        self.gradients.detach()
        self._forget()
        self._calls.forget()
        if self._gradient_mask is not None:
            self._gradient_mask.detach()

    def discard_unstepped(self) -> None:
        """At the end of a step: forgets its statistics if the optimizer did not step (a skipped fp16 step).

        Where it is not called, they are forgotten when the next backward pass finds the gradients cleared.
        """
        if not self._stepped:
            self._forget()
        self._stepped = False

    def _forget(self) -> None:
        self.observer.reset()
        self.meter.reset()
        self._aside.drop()
        self.gradients.forget()

    def metrics(self) -> dict[str, float]:
        """What TensorBoard shows, by the same tags: each curve by layer and by activation.

        Selection misalignment is among them where the last step was measured (``meter.enabled``).
        """
        return as_floats(gate_metrics(self))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore both mechanisms exactly; to be taken between optimizer steps."""
        state: dict[str, Any] = {"steps": self.steps, "forward_passes": self.observer.forward_passes}
        state["options"] = asdict(self.observer.options)
        return state | {name: mechanism.state_dict() for name, mechanism in self._mechanisms().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> Changes:
        """Restores what :meth:`state_dict` returned; the options are those of this controller, from the next step on.

        Returns:
            Options that differ from those of the state, which one line of the log names too.

        Raises:
            ConfigurationError: The state is of other mechanisms or gates, or of options that cannot be changed.
        """
        mechanisms = self._mechanisms()
        saved = sorted({_IMPORTANCE, _STEP_SCALE} & state.keys())
        if saved != sorted(mechanisms):
            raise ConfigurationError(
                f"the checkpoint holds the state of {' and '.join(saved) or 'no mechanism'} and this run has "
                f"{' and '.join(sorted(mechanisms)) or 'none'}; resume with the mechanisms of the checkpoint."
            )
        changes = changed_options(saved_options(state), self.observer.options)
        for name, mechanism in mechanisms.items():
            changed = mechanism.load_state_dict(state[name])
            changes |= {f"{name}.{option}": values for option, values in changed.items()}
        self.steps = int(state["steps"])
        self.observer.forward_passes = int(state["forward_passes"])
        self._forget()
        self._calls.forget()
        self.share_gradient_mask()
        if changes:
            say(f"NA-LoRA goes on with other options than its saved state has: {in_words(changes)}.")
        return changes

    def _mechanisms(self) -> dict[str, TemporalImportance | StepScale]:
        both = {_IMPORTANCE: self.importance, _STEP_SCALE: self.step_scale}
        return {name: mechanism for name, mechanism in both.items() if mechanism is not None}

    def _before_pass(self) -> None:
        self.announce()
        # Whether the step that these passes belong to is skipped shows in the next backward pass.
        if self.gradients.begin_pass():
            self._aside.take([*self.observer.buffers, self.meter.sums])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._calls.begins():
            self._require_same_adapters()
            self._update.remember(optimizer)
            if self._update_of_a is not None:
                self._update_of_a.remember(optimizer)
        return only_first_evaluation(args, kwargs, self._look_away)

    def _look_away(self, closure: Callable[[], Any]) -> Any:
        enabled, self.observer.enabled = self.observer.enabled, False
        try:
            return closure()
        finally:
            self.observer.enabled = enabled

    def _require_same_adapters(self) -> None:
        for site, adapters in zip(self.gates.sites, self._adapters, strict=True):
            if site.adapters != adapters:
                raise UpdateError(
                    f"the active adapters of {site.lora_layer_name!r} were {adapters} when training began and are "
                    f"{site.adapters} now, so other rows train than those that are masked; call set_adapter() before "
                    "training, and train one adapter after the other in a fit of its own."
                )

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A manual optimization steps inside of the training step, and so inside of autocast.
        with single_precision(self.observer.device):
            if not self._calls.is_done():
                self._take_step(optimizer)
            elif self._is_active:
                # Of what a subclass does after its base class has stepped, the mask alone can be told.
                self._correct(optimizer, again=True)

    def _take_step(self, optimizer: Optimizer) -> None:
        if skips_by_itself(optimizer):
            self._forget()
            return
        self._aside.give_back([*self.observer.buffers, self.meter.sums])
        statistics = self.observer.finish_step(self._reduce)
        self.misalignment = self.meter.finish_step(self._reduce)
        self._silence.check(next(iter(statistics.values())).tokens)
        self.gradients.stepped()
        self.steps += 1
        self._stepped = True
        if self.importance is not None:
            self.importance.update(statistics[_IMPORTANCE])
        if self.step_scale is not None:
            self.step_scale.update(statistics[_STEP_SCALE])
        self.watched_scale = self._scale_of_step(statistics.get(_WATCHED))
        if self._is_active:
            self._correct(optimizer)
        self.share_gradient_mask()

    def _scale_of_step(self, statistics: StepStatistics | None) -> StepScale | None:
        if statistics is None or self._watched is None:
            return None
        scale = StepScale(self._watched, self.gates.sites, self.layout)
        scale.update(statistics)
        return scale

    def _correct(self, optimizer: Optimizer, again: bool = False) -> None:
        of_channels, of_a = self.weights, self._weight_of_a
        self._update.correct((of_channels > 0).float() if again else of_channels, optimizer)
        if self._update_of_a is not None:
            self._update_of_a.correct((of_a > 0).float() if again else of_a, optimizer)

    @property
    def _is_active(self) -> bool:
        """Whether updates are corrected by now."""
        return any(mechanism.is_active for mechanism in self._mechanisms().values())

    def share_gradient_mask(self) -> None:
        """Puts the mask in force over the gradient that reaches A; after the importance's state was replaced."""
        if self._gradient_mask is not None and self.importance is not None:
            self._gradient_mask.weights = self.importance.weights if self.importance.is_active else None
