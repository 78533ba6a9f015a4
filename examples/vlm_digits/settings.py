"""What the example does, in numbers; the defaults are those of the measured results in README.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


class ExampleError(RuntimeError):
    """The example cannot go on; the message says why and what helps."""


@dataclass(frozen=True)
class Settings:
    """The numbers of every stage.

    Attributes:
        language_model: Folder of the language side, a causal language model with its tokenizer.
        cache: Folder of what the runs share.
        runs: Folder of what a run leaves.
        train_questions: Questions over training images; two fifths are sums, and the other kinds a fifth each.
        held_out_questions: Questions over held-out images, in equal parts of each kind.
        hidden_size: Width of the vision tower.
        layers: Layers of the vision tower.
        tower_epochs: Passes over the training images as a classifier of digits.
        alignment_steps: Steps that bring the projector near the embeddings of the digits' names.
        projector_steps: Steps of the projector in front of the frozen language model.
        projector_batch_size: Images in each of the latter.
        epochs: Passes of LoRA over the training questions.
        batch_size: Questions in a step of LoRA.
        learning_rate: Largest learning rate of LoRA.
        rank: Rank of LoRA; alpha is twice as large.
        keep_fraction: Fraction of the gate channels that NA-LoRA updates.
        log_every: Steps between two points of a curve.
    """

    language_model: Path = Path(".cache/quickstart/SmolLM2-135M-Instruct")
    cache: Path = Path(".cache/vlm_digits")
    runs: Path = Path("runs/vlm_digits")
    train_questions: int = 600
    held_out_questions: int = 240
    hidden_size: int = 128
    layers: int = 3
    tower_epochs: int = 30
    alignment_steps: int = 400
    projector_steps: int = 40
    projector_batch_size: int = 32
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-3
    rank: int = 16
    keep_fraction: float = 0.5
    log_every: int = 5

    def fast(self) -> Settings:
        """The same example in a few minutes, to see that it works; what it learns is not much."""
        return replace(
            self,
            cache=self.cache / "fast",
            runs=self.runs / "fast",
            train_questions=96,
            held_out_questions=40,
            tower_epochs=20,
            projector_steps=15,
            epochs=1,
        )
