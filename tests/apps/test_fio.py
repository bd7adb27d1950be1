"""fio writes blocks that carry their own checksums and reads them back: sequential, random, buffered and direct."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from .place import Place, run

SIZE = 3 << 20
JOBS: dict[str, tuple[str, ...]] = {
    "sequential": ("rw=write", "bs=64k", "ioengine=psync"),
    "random": ("rw=randwrite", "bs=4k", "ioengine=psync", "fsync=100"),
    "mixed": ("rw=randrw", "bsrange=512-48k", "bs_unaligned=1", "ioengine=psync"),
    "libaio": ("rw=randwrite", "bs=8k", "ioengine=libaio", "iodepth=8"),
    "mmap": ("rw=randwrite", "bs=4k", "ioengine=mmap"),
    "direct": ("rw=randwrite", "bs=16k", "ioengine=psync", "direct=1"),
    "direct-libaio": ("rw=randwrite", "bs=16k", "ioengine=libaio", "iodepth=8", "direct=1"),
}
COMMON = (
    f"size={SIZE}",
    "fallocate=none",
    "randseed=5",
    "verify=crc32c",
    "verify_fatal=1",
    "do_verify=1",
    "invalidate=1",
)


def direct_io_works(directory: Path) -> bool:
    """tmpfs takes O_DIRECT since Linux 6.6."""
    probe = directory / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        probe.unlink()
    return True


def fio(directory: Path, jobs: Path, *args: str) -> dict[str, dict[str, int]]:
    """Run all jobs side by side in the directory; gives the bytes that each wrote and read."""
    report = json.loads(run("fio", "--output-format=json", f"--directory={directory}", *args, jobs, cwd=directory))
    assert all(job["error"] == 0 for job in report["jobs"])
    return {job["jobname"]: {way: job[way]["io_bytes"] for way in ("write", "read")} for job in report["jobs"]}


def test_verify(place: Place) -> None:
    chosen = {name: job for name, job in JOBS.items() if "direct=1" not in job or direct_io_works(place.source)}
    jobs = place.scratch / "jobs.fio"
    jobs.write_text("\n".join("\n".join((f"[{name}]", *COMMON, *job, "")) for name, job in chosen.items()))
    with place.pressure():
        first = fio(place.path, jobs)
    place.forget()
    again = [fio(view, jobs, "--verify_only") for view in (place.path, place.source)]
    for name in chosen:
        assert first[name]["write"] >= SIZE // 3
        for moved in (first, *again):
            assert moved[name]["read"] >= first[name]["write"]
