"""The request slot: what a successor finds in it, whenever its owner died."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from handlefs.protocol import abi
from handlefs.slot import ANSWERED, EXECUTED, EXECUTING, READING, Slot, SlotMemory

REQUEST_SIZE = 10_000


@pytest.fixture
def memory() -> Iterator[SlotMemory]:
    memory = SlotMemory.create(3, REQUEST_SIZE)
    yield memory
    os.close(memory.fd)


def request(unique: int, body: bytes = b"body") -> bytes:
    return abi.fuse_in_header.pack(abi.fuse_in_header.size + len(body), abi.FUSE_MKDIR, unique, 1, 0, 0, 0, 0, 0) + body


def read(slot: Slot, device: int) -> memoryview:
    slot.reading()
    return slot.request[: os.readv(device, (slot.request,))]


def left_by(memory: SlotMemory, index: int, steps: Callable[[Slot, int], object]) -> Slot:
    """The slot, after a process that did the steps in it, with a device to read from, was killed."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, device:
        kernel.send(request(77))
        child = os.fork()
        if child == 0:
            try:
                steps(SlotMemory(memory.fd, 3, REQUEST_SIZE)[index], device.fileno())
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return memory[index]


def test_a_new_slot_is_empty(memory: SlotMemory) -> None:
    for index in range(3):
        assert memory[index].state == ANSWERED
        assert memory[index].unfinished is None
    with pytest.raises(IndexError):
        memory[3]


def test_a_request_that_was_read_is_there(memory: SlotMemory) -> None:
    slot = left_by(memory, 1, read)
    assert slot.state == READING
    assert slot.unique == 77
    assert bytes(slot.unfinished or b"") == request(77)
    assert memory[0].unfinished is None
    assert memory[2].unfinished is None


def test_what_was_recorded_is_there(memory: SlotMemory) -> None:
    def execute(slot: Slot, device: int) -> None:
        read(slot, device)
        slot.executing(b"intent")

    slot = left_by(memory, 0, execute)
    assert (slot.state, slot.intent, slot.unique) == (EXECUTING, b"intent", 77)

    def record(slot: Slot, device: int) -> None:
        execute(slot, device)
        slot.executed(b"reply")

    slot = left_by(memory, 2, record)
    assert (slot.state, slot.reply, slot.unique) == (EXECUTED, b"reply", 77)


def test_an_answered_request_is_not_found_again(memory: SlotMemory) -> None:
    def answer(slot: Slot, device: int) -> None:
        read(slot, device)
        slot.answered()

    assert left_by(memory, 0, answer).unfinished is None


def test_a_request_before_is_not_found_again(memory: SlotMemory) -> None:
    """Killed while it waited for the next one, whose header is not there."""

    def wait(slot: Slot, device: int) -> None:
        read(slot, device)
        slot.answered()
        os.set_blocking(device, False)
        read(slot, device)

    slot = left_by(memory, 0, wait)
    assert slot.state == READING
    assert slot.unfinished is None


def test_the_largest_request_fits(memory: SlotMemory) -> None:
    body = os.urandom(REQUEST_SIZE - abi.fuse_in_header.size)
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, device:
        kernel.send(request(5, body))
        assert bytes(read(memory[1], device.fileno())) == request(5, body)
    assert memory[0].unfinished is None
    assert memory[2].unfinished is None


def test_too_long_a_record_is_refused(memory: SlotMemory) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        memory[0].executed(bytes(4096))
    with pytest.raises(ValueError, match="do not fit"):
        memory[0].executing(bytes(4096))
    assert memory[0].state == ANSWERED


def test_locking_leaves_the_contents_alone(memory: SlotMemory) -> None:
    slot = left_by(memory, 1, read)
    memory.lock(1)
    assert bytes(slot.unfinished or b"") == request(77)


def test_counts_survive(memory: SlotMemory) -> None:
    def count(slot: Slot, _device: int) -> None:
        slot.count_finished()
        slot.counters[5] += 3

    for _ in range(2):
        left_by(memory, 1, count)
    assert memory[1].finished_in_flight == 2
    assert memory[1].counters[5] == 6
    assert memory[0].counters[5] == 0
