"""The state of random numbers in a checkpoint, for each process its own."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

RANDOM_STATE_KEY = "na_lora_lightning_random_state"


class OtherProcessesWarning(UserWarning):
    """A checkpoint was written by more or fewer processes than resume from it."""


def get_random_state(device: torch.device) -> Tensor:
    """State of the random numbers that a training step on ``device`` draws, ``[bytes]`` uint8."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def gather_random_states(device: torch.device, processes: int) -> Tensor:
    """:func:`get_random_state` of every process, ``[processes, bytes]`` uint8; each of them has to call this."""
    own = get_random_state(device)
    if processes == 1:
        return own[None]
    states: list[Tensor] = [own] * processes
    torch.distributed.all_gather_object(states, own)
    return torch.stack(states)


def random_state_of_process(states: Tensor, rank: int, processes: int) -> Tensor | None:
    """What :func:`gather_random_states` has of one process; None, with a warning, if there were more or fewer then."""
    states = states.reshape(-1, states.shape[-1])
    if len(states) != processes:
        rank_zero_warn(
            f"the checkpoint was written by {len(states)} processes and this run has {processes}, so dropout and the "
            "order of the data differ from those of an uninterrupted run, and a step is over "
            f"{processes}/{len(states)} of the records; to resume exactly, use as many processes as before.",
            category=OtherProcessesWarning,
        )
        return None
    # A copy, because torch.set_rng_state crashes on a view into other memory.
    return states[rank].clone()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restores what :func:`get_random_state` returned on the same kind of device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())
