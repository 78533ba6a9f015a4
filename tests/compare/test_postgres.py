"""A comparison on a real PostgreSQL server, which the test starts for itself."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_comparison import begun, made_up, plan, silent, texts

from na_lora_lightning.compare.opening import open_storage
from na_lora_lightning.compare.storage import Comparison


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a database on a server that listens on a socket alone."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if found is None:
        pytest.skip("no PostgreSQL server is installed")
    # The server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None and user not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = f"{folder}/data"

        def run(name: str, *arguments: str) -> None:
            command = [str(Path(found).with_name(name)), "-D", data, *arguments]
            subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

        run("initdb", "--auth=trust", "--username=tester", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


@contextmanager
def opened(url: str) -> Iterator[Any]:
    storage: Any = open_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@pytest.mark.postgres
def test_two_workers_on_postgresql_end_with_the_page_of_one_on_sqlite(server: str, tmp_path: Path) -> None:
    alone = begun(tmp_path, plan())
    alone.work(made_up, say=silent)
    done: list[list[Any]] = [[], []]

    def work(own: list[Any]) -> None:
        with opened(server) as storage:
            comparison = Comparison.begin(storage, "test", plan())
            comparison.work(lambda cell: own.append(cell) or made_up(cell), say=silent)  # type: ignore[func-returns-value]

    # So that both have cells to take.
    with opened(server) as storage:
        Comparison.begin(storage, "test", plan())
    workers = [threading.Thread(target=work, args=(own,)) for own in done]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done[0] + done[1]) == sorted(plan().cells())
    with opened(server) as storage:
        assert texts(Comparison.there(storage, "test")) == texts(alone)
