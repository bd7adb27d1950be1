"""What is asked of the kernel: to forget, to be quiet, and what it is."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

NAMES = 2  # for drop_caches: directory entries and inodes
NAMES_AND_DATA = 3

POLL_SECONDS = 0.02
QUIET_POLLS = 4
QUIET_SHARE = 0.02  # of a CPU, all servers together: a server that waits for requests may still have a timer


def drop_caches(what: int) -> None:
    """Drop clean caches, of all file systems: all contestants are as cold as the one to be measured."""
    os.sync()
    # A directory entry that was used since the last time is only marked in a first pass.
    for _ in range(2):
        Path("/proc/sys/vm/drop_caches").write_text(str(what))


def processes(pid: int) -> list[int]:
    """*pid* and its descendants: a server may have worker processes."""
    found = [pid]
    for parent in found:  # grows meanwhile
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found


def kill(pid: int) -> None:
    """SIGKILL, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_group(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process that leads a group and has not been waited for, and to its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def memory(pid: int) -> float:
    """MiB of a server's own memory and that of its descendants: anonymous, shared, and files in memory (memfds) that they
    have open, whether mapped or not; what several share counts once."""
    group = processes(pid)
    pages = sum(map(_own_pages, group)) << 10
    return (pages + sum(_memory_files(group).values())) / (1 << 20)


def descriptors(pid: int) -> int:
    """How many descriptors a server and its descendants have open."""
    return sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes(pid))


def _own_pages(pid: int) -> int:
    """KiB of pages that are in no file, proportionally; without those of memfds, which count as files."""
    kibibytes, of_memory_file = 0, False
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
            kibibytes += int(line.split()[1])
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":  # a mapping begins
            of_memory_file = "/memfd:" in line
        elif of_memory_file and line.startswith("Pss:"):
            kibibytes -= int(line.split()[1])
    return kibibytes


def _memory_files(pids: Iterable[int]) -> dict[tuple[int, int], int]:
    """The bytes of each memfd that one of these processes has open, by device and inode."""
    found = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(descriptor).startswith("/memfd:"):
                    status = descriptor.stat()
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a server and its descendants since their start, in seconds; what has ended does not count."""
    return sum(map(_cpu_clock, processes(pid)))


def _cpu_clock(pid: int) -> float:
    # The kernel's number for the CPU clock of a process, as clock_getcpuclockid(3) computes it. /proc/PID/stat
    # counts in ticks of 10 ms, in which a C server handles thousands of FORGETs.
    clock = (~pid << 3) | 2
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def wait_until_quiet(pids: Sequence[int], patience: float) -> int | None:
    """Return when the servers have nothing left to do, such as the FORGETs that dropped caches cause; if there always is
    something, after *patience* seconds: then the busiest of them is returned."""
    # FORGETs have no reply, so the kernel does not count them among the requests that wait.
    at_first, deadline = {pid: cpu_seconds(pid) for pid in pids}, time.monotonic() + patience
    quiet, before, since = 0, sum(at_first.values()), time.monotonic()
    while quiet < QUIET_POLLS:
        if since > deadline:
            return max(pids, key=lambda pid: cpu_seconds(pid) - at_first[pid])
        time.sleep(POLL_SECONDS)
        now, used = time.monotonic(), sum(map(cpu_seconds, pids))
        quiet = quiet + 1 if used - before <= QUIET_SHARE * (now - since) else 0
        before, since = used, now
    return None


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted at *mountpoint*, without asking its server."""
    return _mount_fields(mountpoint) is not None


def mount_options(mountpoint: Path) -> str:
    """The options of the mount and its file system, as the kernel shows them."""
    fields = _mount_fields(mountpoint)
    return "" if fields is None else ",".join(dict.fromkeys([*fields[5].split(","), *fields[-1].split(",")]))


def filesystem_type(directory: Path) -> str:
    """The type of the file system that *directory* is on."""
    place = directory.resolve()
    for candidate in (place, *place.parents):
        if fields := _mount_fields(candidate):
            return fields[fields.index("-") + 1]
    return "unknown"


def machine() -> str:
    """How many CPUs there are, what they call themselves, and how much memory."""
    model = os.uname().machine
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            model = line.partition(":")[2].strip()
            break
    gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return f"{os.cpu_count()} CPUs ({model}), {gibibytes:.0f} GiB"


def _mount_fields(mountpoint: Path) -> list[str] | None:
    """The uppermost mount there, as split fields of /proc/self/mountinfo."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[4] == _escaped(mountpoint):
            found = fields
    return found


def _escaped(path: Path) -> str:
    """As the kernel writes a path in mountinfo."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in str(path))
