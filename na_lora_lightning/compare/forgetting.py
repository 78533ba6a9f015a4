"""How far a fit moved the model: on text that no arm is trained on, and on what the base model itself answers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from na_lora_lightning.compare.measuring import Batch, right_padded, target_logits
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.labels import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_PASSAGE = 128
_AT_ONCE = 4
_ANSWERS, _ANSWER_TOKENS, _LONGEST_PROMPT = 16, 32, 256
# Of what the base model says, in float32, which else is computed for each cell again.
_MOST_KEPT_BYTES = 1 << 30


class FixedText:
    """A text on which adapted models are compared with their base model.

    Args:
        rows: Tokens of each passage, and the number of them that are given and not scored.
    """

    def __init__(self, rows: Sequence[tuple[list[int], int]]) -> None:
        ordered = sorted(rows, key=lambda row: len(row[0]))
        records = [
            {
                "input_ids": torch.tensor(ids),
                "attention_mask": torch.ones(len(ids), dtype=torch.int64),
                "labels": torch.tensor([IGNORED_LABEL] * given + ids[given:]),
            }
            for ids, given in ordered
        ]
        self._batches = [right_padded(records[start : start + _AT_ONCE]) for start in range(0, len(records), _AT_ONCE)]
        self._key: Hashable = None
        self._of_base: list[Tensor] | None = None

    @torch.no_grad()
    def measure(
        self, model: Any, load_base: Callable[[], Any], device: torch.device, key: Hashable = None
    ) -> tuple[float, float, float]:
        """Loss of model and base model, and how far the one is from the other.

        Args:
            model: Adapted, in evaluation mode, on ``device``.
            load_base: Gives the base model, likewise.
            device: Where to compute.
            key: What tells one base model from another; what it says is kept as long as this stays. None keeps nothing.

        Returns:
            Mean loss of the model and of the base model (nats per token), and the mean over tokens of
            KL(base ‖ model) in nats.
        """
        if self._of_base is None or key is None or key != self._key:
            base = load_base()
            self._of_base = [part for batch in self._batches for _, part in _log_probabilities(base, batch, device)]
            self._key = key
        of_base = iter(self._of_base)
        totals = torch.zeros(3, dtype=torch.float64)
        count = 0
        for batch in self._batches:
            for targets, of_model in _log_probabilities(model, batch, device):
                before = next(of_base)
                kl = functional.kl_div(of_model, before, log_target=True, reduction="sum")
                places = targets[:, None]
                losses = (-of_model.gather(1, places).sum(), -before.gather(1, places).sum(), kl)
                totals += torch.stack(losses).double().cpu()
                count += len(targets)
        if sum(part.nbytes for part in self._of_base) > _MOST_KEPT_BYTES or key is None:
            self._of_base = None
        model_loss, base_loss, mean = (totals / count).tolist()
        return model_loss, base_loss, mean


def _log_probabilities(model: Any, batch: Batch, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Targets and log-probabilities of all tokens in their place, in parts."""
    found = {name: value.to(device) for name, value in batch.items()}
    return [(targets, logits.log_softmax(dim=-1)) for _, targets, logits in target_logits(model, found)]


def other_text(tokenizer: PreTrainedTokenizerBase, file: str | None = None) -> FixedText:
    """A text that no arm is trained on, on which forgetting is measured.

    Args:
        tokenizer: Of the model.
        file: A text file, whose passages are separated by empty lines; None stands for one that ships.

    Raises:
        ConfigurationError: The file cannot be read, or has no passage of at least two tokens.
    """
    try:
        source = resources.files("na_lora_lightning.compare") / "other_text.txt" if file is None else Path(file)
        text = source.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the text {file!r} cannot be read ({error}); correct --other-text.") from error
    passages = [" ".join(passage.split()) for passage in text.split("\n\n")]
    encoded = [tokenizer(passage)["input_ids"][:_LONGEST_PASSAGE] for passage in passages if passage]
    rows = [(ids, 1) for ids in encoded if len(ids) > 1]
    if not rows:
        raise ConfigurationError(f"the text {file!r} has no passage of two tokens; correct --other-text.")
    return FixedText(rows)


def own_answers(
    batches: Iterable[Batch], load_base: Callable[[], Any], name: str, device: torch.device, folder: Path
) -> FixedText | None:
    """What the base model itself answers to the first prompts of the data, drawn once and kept in a file.

    Args:
        batches: Of validation; what comes before a record's first target is its prompt.
        load_base: Gives the base model, in evaluation mode, on ``device``.
        name: Tells the base model from others.
        device: Where to compute.
        folder: Where answers are kept, so that all fits of a comparison have the same.

    Returns:
        The answers; None where the data has no prompts.
    """
    prompts = list(islice(_prompts(batches), _ANSWERS))
    if not prompts:
        return None
    path = folder / f"answers_{hashlib.sha256(f'{name}:{prompts}'.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        answers = _drawn(load_base(), prompts, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(answers), encoding="utf-8")
        partial.replace(path)
    answers = json.loads(path.read_text(encoding="utf-8"))
    return FixedText([([*given, *new], len(given)) for given, new in zip(prompts, answers, strict=True)])


def _prompts(batches: Iterable[Batch]) -> Iterator[list[int]]:
    for batch in batches:
        if not {"input_ids", "attention_mask"} <= batch.keys() or not batch["attention_mask"][:, 0].all():
            return
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            targets = (labels != IGNORED_LABEL).nonzero()
            length = int(targets[0]) if len(targets) else 0
            if 1 < length <= _LONGEST_PROMPT:
                yield ids[:length].tolist()


@torch.no_grad()
def _drawn(base: Any, prompts: list[list[int]], device: torch.device) -> list[list[int]]:
    """Continuations at temperature 1, so that the mean over them is one over what the model says."""
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left").to(device)
        for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
    )
    ends = getattr(base.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        found = base.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
    rows = found[:, ids.shape[1] :].tolist()
    cuts = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: cut + 1] for row, cut in zip(rows, cuts, strict=True)]
