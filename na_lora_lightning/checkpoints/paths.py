"""What two paths have to do with each other, through links, ``..``, relative and other spellings."""

from __future__ import annotations

import os
from pathlib import Path

# Device and inode of the nearest parent that exists, and the names below it.
_Identity = tuple[int, int, tuple[str, ...]]


def same_path(first: str | Path, second: str | Path) -> bool:
    """Whether two paths lead to the same file or folder, which need not exist yet.

    Args:
        first: A path; ``~`` stands for the user's home.
        second: Another.
    """
    return _identity(_resolved(first)) == _identity(_resolved(second))


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path leads to a folder itself, or to something in it; neither needs to exist yet.

    Args:
        path: A path; ``~`` stands for the user's home.
        folder: The folder.
    """
    place, outer = _resolved(path), _identity(_resolved(folder))
    return any(_identity(parent) == outer for parent in (place, *place.parents))


def _resolved(path: str | Path) -> Path:
    place = Path(path).expanduser()
    try:
        return place.resolve()
    except (OSError, RuntimeError):
        # A link that leads to itself.
        return place.absolute()


def _identity(place: Path) -> _Identity:
    # Names say too little: of two mounts of a folder, or on a disk that takes capitals for small letters.
    for parent in (place, *place.parents):
        try:
            status = parent.stat()
        except OSError:
            continue
        below = place.relative_to(parent).parts
        return status.st_dev, status.st_ino, tuple(os.path.normcase(name) for name in below)
    return 0, 0, place.parts
