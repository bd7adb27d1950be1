"""SQLite: byte-range locks, journals that are deleted or truncated, shared memory for its write-ahead log, fsync."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from .place import Place, run

TRANSACTIONS = 40
ROWS = 5

WRITER = """
import sqlite3, sys
path, mode = sys.argv[1:3]
transactions, rows, writer = map(int, sys.argv[3:])
database = sqlite3.connect(path, timeout=120, isolation_level=None)
database.execute(f"PRAGMA journal_mode={mode}").fetchone()
for number in range(transactions):
    database.execute("BEGIN IMMEDIATE")
    before, = database.execute("SELECT total FROM counter").fetchone()
    for row in range(rows):
        text = f"{writer} {number} {row} " * 40
        database.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", (writer, number, row, text))
    database.execute("UPDATE counter SET total = ?", (before + rows,))
    database.execute("COMMIT")
database.close()
"""


def _create(path: Path, mode: str) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    assert database.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
    database.execute("CREATE TABLE entry (writer INT, number INT, row INT, text TEXT, UNIQUE (writer, number, row))")
    database.execute("CREATE TABLE counter (total INT)")
    database.execute("INSERT INTO counter VALUES (0)")
    database.close()


def _two_writers(path: Path, mode: str) -> None:
    arguments = [str(path), mode, str(TRANSACTIONS), str(ROWS)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, *arguments, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=600)
        assert writer.returncode == 0, errors


@pytest.mark.parametrize("mode", ["delete", "truncate", "wal"])
def test_two_processes_writing(place: Place, mode: str) -> None:
    path = place.path / "data.db"
    with place.pressure():
        _create(path, mode)
        _two_writers(path, mode)
        assert run("sqlite3", path, "PRAGMA integrity_check") == "ok\n"
    place.forget()
    expected = 2 * TRANSACTIONS * ROWS
    for view in (path, place.source / "data.db"):
        database = sqlite3.connect(f"file:{view}?mode=ro", uri=True)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT total FROM counter").fetchall() == [(expected,)]
        assert database.execute("SELECT count(*), count(DISTINCT text) FROM entry").fetchall() == [(expected, expected)]
        database.close()


def test_dump_and_reload_with_the_cli(place: Place) -> None:
    first, second = place.path / "first.db", place.path / "second.db"
    with place.pressure():
        script = place.path / "load.sql"
        values = ",\n".join(f"({n}, '{n * 7919 % 1009:>60}')" for n in range(2000))
        script.write_text(f"CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT);\nINSERT INTO t VALUES\n{values};\n")
        changes = ("CREATE INDEX by_text ON t (text)", "DELETE FROM t WHERE n % 3 = 0")
        run("sqlite3", "-bail", first, f".read {script}", *changes)
        run("sqlite3", "-bail", first, "VACUUM", f".backup {second}")
        assert run("sqlite3", second, "PRAGMA integrity_check") == "ok\n"
        assert run("sqlite3", first, ".dump") == run("sqlite3", second, ".dump")
        assert run("sqlite3", second, "SELECT count(*), sum(n) FROM t WHERE text >= ''").split("|") == [
            str(sum(n % 3 != 0 for n in range(2000))),
            f"{sum(n for n in range(2000) if n % 3)}\n",
        ]
