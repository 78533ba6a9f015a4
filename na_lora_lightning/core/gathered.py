"""Gates that see tokens picked by a router: experts that are a pair of linear layers each.

Which token a row is shows by its values: routers copy rows of what a module around the experts was given. So the rows
that an expert's layer is given are looked up among those, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keys(rows: Tensor) -> Tensor:
    """A number for the bits of each row.

    Args:
        rows: ``[rows, features]``, floating point.

    Returns:
        ``[rows]`` int64; equal for equal rows, and hardly ever for others.
    """
    bits = rows.detach().contiguous().view(_INTEGERS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator).to(rows.device) * 2 + 1
    # Wraps around, in whatever order it is added up.
    return (bits * factors).sum(dim=-1)


def places(rows: Tensor, among: Tensor) -> Tensor | None:
    """Where each row stands among others.

    Args:
        rows: ``[rows, features]``.
        among: ``[tokens, features]`` in the same type.

    Returns:
        ``[rows]`` int64; None where some row is none of them.
    """
    if rows.dtype != among.dtype or rows.shape[-1] != among.shape[-1] or not len(among):
        return None
    known, order = keys(among).sort(stable=True)
    wanted = keys(rows)
    found = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return order[found] if bool((known[found] == wanted).all()) else None


def tokens_given(args: tuple[Any, ...], kwargs: Mapping[str, Any], features: int) -> Tensor | None:
    """The first argument of a module's call that holds ``features`` of each token, as ``[tokens, features]``."""
    given = given_features(args, kwargs, features)
    return None if given is None else given.reshape(-1, features)


def given_features(args: tuple[Any, ...], kwargs: Mapping[str, Any], features: int) -> Tensor | None:
    """The same, in the shape in which it was given."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and value.shape[-1] == features:
            return value
    return None
