"""Opening of what Optuna keeps the trials of a comparison in."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event

from na_lora_lightning.errors import ConfigurationError, one_line

_HEARTBEAT_SECONDS, _GRACE_SECONDS = 15, 90
_LOCK_SECONDS = 120
_JOURNAL = "journal://"


@contextmanager
def without_news() -> Iterator[None]:
    """Keeps Optuna's warnings about its experimental parts to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def open_storage(url: str, heartbeat: int = _HEARTBEAT_SECONDS, grace: int = _GRACE_SECONDS) -> BaseStorage:
    """Opens, and if need be makes, what trials are kept in.

    Args:
        url: Of a database, as SQLAlchemy writes it (``sqlite:///comparison.db``, ``postgresql+psycopg://...``), or
            ``journal://FILE`` for a journal, which has no heartbeat.
        heartbeat: Seconds between two signs of life of a worker.
        grace: Seconds without one after which its cell is queued again.

    Raises:
        ConfigurationError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with without_news():
            if url.startswith(_JOURNAL):
                Path(url[len(_JOURNAL) :]).parent.mkdir(parents=True, exist_ok=True)
                return JournalStorage(JournalFileBackend(url[len(_JOURNAL) :]))
            options = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite") else {}
            if url.startswith("sqlite:///"):
                Path(url[len("sqlite:///") :]).parent.mkdir(parents=True, exist_ok=True)
            storage = _patiently(
                lambda: RDBStorage(url, engine_kwargs=options, heartbeat_interval=heartbeat, grace_period=grace)
            )
            if url.startswith("sqlite"):
                # Several workers wait less for one another, and nothing for the disk.
                event.listen(storage.engine, "connect", _write_ahead)
                storage.engine.dispose()
            return storage
    except Exception as error:
        # Of the database's own package, SQLAlchemy or Optuna.
        raise ConfigurationError(
            f"the storage {_without_password(url)!r} cannot be opened ({one_line(error)}); correct --storage."
        ) from error


def _write_ahead(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _patiently(make: Callable[[], RDBStorage]) -> RDBStorage:
    # Workers that start at once make the same tables.
    for attempt in range(5):
        try:
            return make()
        except ImportError:
            raise
        except Exception:  # Of whichever driver the database has; the fifth is raised.
            if attempt == 4:
                raise
            time.sleep(0.5 * (attempt + 1))
    raise AssertionError


def _without_password(url: str) -> str:
    start, at, end = url.rpartition("@")
    scheme, separator, _ = start.partition("://")
    return f"{scheme}{separator}...@{end}" if at else url
