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

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.compilation import forget_graphs, single_precision
from na_lora_lightning.core.in_force import describe, say, warn_after, warn_before
from na_lora_lightning.core.lora_layers import LoRARows
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.mechanism import Mechanism
from na_lora_lightning.core.mechanisms.mechanism_set import MechanismSet
from na_lora_lightning.core.mechanisms.metrics import GateMetrics, gate_metrics
from na_lora_lightning.core.mechanisms.saved_options import Changes, in_words
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.model_entry import entrance_of, root_of
from na_lora_lightning.core.observation.misalignment import MisalignmentMeter
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions
from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.core.silent_sites import SilenceCheck
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.core.stepping.hooks import StepHooks
from na_lora_lightning.core.stepping.optimizers import optimizer_of_rows, skips_by_itself
from na_lora_lightning.core.stepping.rows import RowUpdate
from na_lora_lightning.core.stepping.skipped_steps import Aside, GradientWatch
from na_lora_lightning.errors import ConfigurationError


class GateController:
    """Observes the gates of a model and corrects the updates of their LoRA rows.

    Args:
        model: The PEFT model (or a module that holds LoRA layers), on its final device.
        gates: What :func:`~na_lora_lightning.core.discovery.gates.discover_gates` found in it.
        observer_options: What the observer looks at.
        reduce: Adds a tensor over all processes in place; None for one process.

    Attributes:
        mechanisms: Those that are on.
        steps: Optimizer steps so far, those before a resume included where :meth:`load_state_dict` was called.
        total_steps: What ``steps`` will be when training ends, where that is known.
        announced: Whether it was said what is in force.
        misalignment: Result of the last measured step: mean |Δρ| ``[sites]`` and squared norms ``[2, sites]``.
        notes: Numbers of yours by name, which a history of the training shows beside the gates.
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
        self.mechanisms = MechanismSet(gates, self.observer, self.layout)
        self.misalignment: tuple[Tensor, Tensor] | None = None
        self.steps = 0
        self.total_steps: float | None = None
        self.announced = False
        self.notes: dict[str, float] = {}
        self._warned_before = False
        self._steps_when_attached = 0
        self._reduce = reduce
        self._update = RowUpdate(gates.sites, self.layout)
        self._hooks = StepHooks(self._before_step, self._after_step, self._after_more, self.observer.unobserved)
        self._stepped = False
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
            ConfigurationError: It is on already, its options do not work for a site, or training began.
        """
        return self.mechanisms.turn_on(TemporalImportance, options)

    def set_step_scale(self, options: StepScaleOptions) -> StepScale:
        """Turns the step scale on; before :meth:`attach`.

        Raises:
            ConfigurationError: It is on already, would be exactly 1 for every gate, or training began.
        """
        mechanism = self.mechanisms.turn_on(StepScale, options)
        if self.mechanisms.factor_of_a != 1.0:
            # Several sites may share a layer.
            entries = {id(entry.parameter): entry for site in self.gates.sites for entry in site.matrices_a()}
            self._correct_too(entries.values())
            self._update = RowUpdate(self.gates.sites, self.layout, entries.values())
        return mechanism

    @property
    def importance(self) -> TemporalImportance | None:
        """Mechanism one, where it is on."""
        return self.mechanisms.importance

    @property
    def step_scale(self) -> StepScale | None:
        """Mechanism two, where it is on."""
        return self.mechanisms.step_scale

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on the model and the optimizer."""
        return bool(self._hooks)

    @property
    def weights(self) -> Tensor:
        """m·η of each channel of all sites, ``[channels]`` float32."""
        return self.mechanisms.row_weights

    def optimizer_of_gates(self, optimizers: Iterable[Optimizer]) -> Optimizer:
        """Finds the optimizer that holds every LoRA row parameter of the gates.

        Raises:
            UpdateError: None does, some rows are in none, they are spread over several optimizers, or the optimizer
                moves parameters at other moments than its step.
        """
        return optimizer_of_rows(self._parameters, optimizers)

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Registers the hooks on the model and on the optimizer that holds the gates' rows.

        Raises:
            UpdateError: The update cannot be reached.
            ConfigurationError: No mechanism is set, or the optimizer's steps are corrected already.
        """
        if not self.mechanisms:
            raise ConfigurationError(
                "no mechanism is set, so training would be plain LoRA; call set_importance() or set_step_scale() first."
            )
        self._hooks.attach(self.optimizer_of_gates(optimizers))
        self._steps_when_attached = self.steps
        self.mechanisms.attach(lambda: self.meter.enabled)
        # The meter's hooks on lora_B must exist before a pre-activation is observed; order does not matter further.
        self.meter.attach()
        self.observer.attach()
        self.gradients.attach()
        forget_graphs()

    def announce(self) -> None:
        """Says once what is in force, and warns where that will be nothing; by itself in the first forward pass."""
        if self.announced:
            return
        self.announced = True
        say(describe(self.gates, self.mechanisms))
        left = None if self.total_steps is None else self.total_steps - self.steps
        self._warned_before = warn_before(self.gates, self.mechanisms, left)

    def conclude(self) -> None:
        """Warns of what never acted, at the end of a training that ran its course; before :meth:`detach`."""
        if self.is_attached and self.steps > self._steps_when_attached:
            warn_after(self.gates, self.mechanisms, self.gradients.backward_passes > 0, self._warned_before)

    def detach(self) -> None:
        """Removes every hook from the model and the optimizer."""
        if self._hooks:
            forget_graphs()
        self._hooks.detach()
        self.observer.detach()
        self.meter.detach()
        self.gradients.detach()
        self._begin_step()
        self.mechanisms.detach()

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
        """What TensorBoard shows, by the same tags: curves over all layers (``gates/responsiveness``) and by layer.

        Selection misalignment is among them where the last step was measured (``meter.enabled``).
        """
        found = self.gate_metrics()
        return found.overview() | found.by_layer()

    def gate_metrics(self) -> GateMetrics:
        """The same by site, with one synchronisation with the device."""
        return gate_metrics(self.gates, self.mechanisms, self.misalignment)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore all mechanisms exactly; to be taken between optimizer steps."""
        return {"steps": self.steps} | self.mechanisms.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> Changes:
        """Restores what :meth:`state_dict` returned; the options are those of this controller, from the next step on.

        Returns:
            Options that differ from those of the state, which one line of the log names too.

        Raises:
            ConfigurationError: The state is of other mechanisms or gates, or of options that cannot be changed.
        """
        changes = self.mechanisms.load_state_dict(state)
        self.steps = int(state["steps"])
        self._begin_step()
        if changes:
            say(f"NA-LoRA resumes with other options than its saved state has: {in_words(changes)}.")
        return changes

    @torch.no_grad()
    def load_state_of(self, mechanism: Mechanism, state: Mapping[str, Any]) -> Changes:
        """Restores what :meth:`~.mechanism_set.MechanismSet.state_of` returned for one mechanism.

        Returns:
            Options that differ from those of the state.

        Raises:
            ConfigurationError: The state is of other gates, or of options that cannot be changed.
        """
        changes = self.mechanisms.load_state_of(mechanism, state)
        self._begin_step()
        return changes

    def _begin_step(self) -> None:
        self._forget()
        self._hooks.forget()

    def _before_pass(self) -> None:
        self.announce()
        # Whether the step that these passes belong to is skipped shows in the next backward pass.
        if self.gradients.begin_pass():
            self._aside.take([*self.observer.buffers, self.meter.sums])

    def _before_step(self, optimizer: Optimizer) -> None:
        self._update.remember(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        if skips_by_itself(optimizer):
            self._forget()
            return
        # A manual optimization steps inside of the training step, and so inside of autocast.
        with single_precision(self.observer.device):
            self._aside.give_back([*self.observer.buffers, self.meter.sums])
            statistics = self.observer.finish_step(self._reduce)
            self.misalignment = self.meter.finish_step(self._reduce)
            self._silence.check(next(iter(statistics.values())).tokens)
            self.gradients.stepped()
            self.steps += 1
            self._stepped = True
            self.mechanisms.update(statistics)
            if self.mechanisms.are_active:
                self._update.correct(optimizer, self.weights, self.mechanisms.factor_of_a)

    def _after_more(self, optimizer: Optimizer) -> None:
        if self.mechanisms.are_active:
            # Of what a subclass does after its base class has stepped, the mask alone can be told.
            with single_precision(self.observer.device):
                self._update.correct(optimizer, (self.weights > 0).float(), float(self.mechanisms.factor_of_a > 0))
