"""What a client holds stays valid when everything is evicted, when new code takes over from the server, when that is restarted,
also with the other transport, and when it is killed.

All stories of both NFS versions live through one event together, and are then checked one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from .knfsd import Client, Export
from .stories import ENTRIES, EVICTION, OUTAGE, RESTART, STORIES, SWITCH, UPGRADE, Setting, Story

Told = dict[tuple[type[Story], str], Story]


@pytest.fixture(scope="session")
def many(export: Export) -> dict[bytes, int]:
    """A directory with so many entries that it takes several requests to list: each name and its inode number."""
    directory = export.source / "many"
    directory.mkdir()
    for number in range(ENTRIES):
        os.close(os.open(directory / f"entry-{number:05}", os.O_WRONLY | os.O_CREAT))
    with os.scandir(directory) as entries:
        return {os.fsencode(entry.name): entry.inode() for entry in entries}


@pytest.fixture(scope="module")
def told(event: str, export: Export, clients: dict[str, Client], many: dict[bytes, int]) -> Iterator[Told]:
    """The stories, after the event."""
    with lived_through(event, export, clients, many) as told:
        yield told
    if event == SWITCH:
        export.switch()  # back


@contextmanager
def lived_through(event: str, export: Export, clients: dict[str, Client], many: dict[bytes, int]) -> Iterator[Told]:
    with ExitStack() as stack:
        told: Told = {}
        for story in STORIES:
            for version, client in clients.items():
                place = export.source / f"{event}-{story.name}-{version}"
                place.mkdir()
                other = next(client for client in clients.values() if client.version != version)
                told[story, version] = stack.enter_context(story(Setting(export, event, client, other, place, many)))
        happen(event, export, list(told.values()))
        yield told


def happen(event: str, export: Export, stories: list[Story]) -> None:
    if event == OUTAGE:
        with export.outage():
            for story in stories:
                story.meanwhile()
        return
    for story in stories:
        story.meanwhile()
    events = {EVICTION: export.forget, UPGRADE: export.upgrade, RESTART: export.restart, SWITCH: export.switch}
    events[event]()


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_story(told: Told, story: type[Story], version: str) -> None:
    told[story, version].check()
