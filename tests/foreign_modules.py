"""Lightning projects that know nothing of this package, each odd in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning_models import Batches, ForeignModule, tiny_peft_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import LLAMA_TARGETS, tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

PLAIN_CHANNELS = 20


def start_lora(network: Any) -> Any:
    """Gives the adapter a non-zero start, so that it does something."""
    torch.manual_seed(2)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return network.train()


class PlainNetwork(nn.Module):
    """Somebody's own gated block on vectors: no configuration, no vocabulary, no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.gate = nn.Linear(8, PLAIN_CHANNELS)
        self.up = nn.Linear(8, PLAIN_CHANNELS)
        self.activation = nn.SiLU()
        self.down = nn.Linear(PLAIN_CHANNELS, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(features)
        hidden = hidden + self.down(self.activation(self.gate(hidden)) * self.up(hidden))
        return {"prediction": self.head(hidden)}


PLAIN_CONFIG = LoraConfig(r=4, target_modules=["gate", "up", "down"])
PLAIN_EXAMPLE = {"features": torch.linspace(-1, 1, 12).view(2, 6)}


def plain_peft_network() -> Any:
    torch.manual_seed(1)
    return start_lora(get_peft_model(PlainNetwork(), PLAIN_CONFIG))


def plain_injected_network() -> Any:
    torch.manual_seed(1)
    return start_lora(inject_adapter_in_model(PLAIN_CONFIG, PlainNetwork()))


def optimizer_of(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    settings = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **settings)


class PlainModule(LightningModule):
    """Trains a plain network on batches that are lists; its losses come in a dictionary."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = plain_peft_network() if network is None else network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        features, target = batch
        prediction = self.network(features)["prediction"]
        return {"loss": (prediction - target).square().mean(), "prediction": prediction.detach()}

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


def plain_loader(count: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(count * 5, 6, generator=generator)
    return DataLoader(torch.utils.data.TensorDataset(features, features.sum(dim=1, keepdim=True)), batch_size=5)


class LayersOnTheModule(LightningModule):
    """No network at all: the layers stand on the LightningModule, whose forward calls them."""

    def __init__(self) -> None:
        super().__init__()
        block = plain_injected_network()
        self.embed, self.gate, self.up, self.down, self.head = block.embed, block.gate, block.up, block.down, block.head
        self.activation = nn.SiLU()

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.embed(features)
        return self.head(hidden + self.down(self.activation(self.gate(hidden)) * self.up(hidden)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


class Held(ForeignModule):
    """Has its model wherever ``hold`` puts it."""

    def __init__(self, hold: Callable[[Held, nn.Module], None], get: Callable[[Held], nn.Module]) -> None:
        super().__init__()
        del self.network
        hold(self, tiny_peft_model("llama"))
        self.get = get

    @property
    def model(self) -> Any:
        return self.get(self)


class BuiltLate(ForeignModule):
    """Builds its model in ``setup`` or in ``configure_model``."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        del self.network
        # A common name, which makes it no Hugging Face model.
        self.config = {"hook": hook}

    def _build(self, hook: str) -> None:
        if self.config["hook"] == hook and not hasattr(self, "network"):
            self.network = nn.ModuleDict({"language": tiny_peft_model("llama")})

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")


class Injected(ForeignModule):
    """LoRA without a ``PeftModel``, in a Hugging Face model inside of somebody's network."""

    def __init__(self, how: str) -> None:
        super().__init__()
        inner: Any = tiny_llama()
        config = LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS)
        torch.manual_seed(1)
        if how == "add_adapter":
            inner.add_adapter(config)
        else:
            inner = inject_adapter_in_model(config, inner)
        network = nn.Module()
        network.language = start_lora(inner)
        self.network = nn.ModuleDict({"outer": network})

    @property
    def model(self) -> Any:
        return self.network["outer"].language


class Delegating(ForeignModule):
    """Hands on the attributes of its model, ``peft_config`` among them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network")["language"], name)


class Distilled(ForeignModule):
    """A frozen teacher with an adapter of its own beside the student."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = with_lora(tiny_llama(seed=5), LLAMA_TARGETS).requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(**batch).logits
        output = self.model(**batch)
        return output.loss + (output.logits - wanted).square().mean()


class Record(NamedTuple):
    """A batch that is no mapping."""

    tokens: Tensor
    real: Tensor
    targets: Tensor


class OddBatches(ForeignModule):
    """Takes batches in whatever form; padding is told to the model alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, real, targets = batch if isinstance(batch, (tuple, list)) else vars(batch).values()
        logits = self.model(tokens, real).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


class Validated(ForeignModule):
    """Validates with gradients switched on, as models of forces do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.validations = 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validations += 1
        with torch.inference_mode(False), torch.enable_grad():
            self.log("val_loss", self.model(**batch).loss.detach())

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).logits


class Manual(ForeignModule):
    """Steps by itself, every ``every`` batches; another optimizer steps in each."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        own, other = self.optimizers()  # type: ignore[misc]
        loss = self.model(**batch).loss / self.every
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            own.step()
            own.zero_grad()
        self.manual_backward(self.other(torch.ones(1)).sum())
        other.step()
        other.zero_grad()
        self.losses.append(loss.item() * self.every)
        self.log("loss", loss.detach())

    def configure_optimizers(self) -> Any:
        return [optimizer_of(self.network), torch.optim.SGD(self.other.parameters(), lr=0.1)]


class WithBackbone(ForeignModule):
    """A backbone without LoRA, which ``BackboneFinetuning`` thaws in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.backbone = nn.Linear(4, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.backbone(torch.ones(4)).square().sum()

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


class Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(Batches(4).batches)
