"""Several processes on one machine, with the environment that torchrun gives them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def run_in_processes(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Calls ``function(*arguments)`` in each of ``count`` processes and waits; the first error of one is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forks need no import of everything, but cannot be made once a graphics card is in use.
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(_call, (function, arguments, count, port), nprocs=count, start_method=method)


def _call(rank: int, function: Callable[..., None], arguments: tuple[Any, ...], count: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        # As torchrun sets it.
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
