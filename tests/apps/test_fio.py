"""fio writes blocks that carry their own checksums and reads them back: sequential, random, buffered and direct."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from .place import Place, run

SIZE = 4 << 20
JOBS = {
    "sequential": ("--rw=write", "--bs=64k", "--ioengine=psync"),
    "random": ("--rw=randwrite", "--bs=4k", "--ioengine=psync", "--fsync=100"),
    "mixed-sizes": ("--rw=randrw", "--bsrange=512-48k", "--bs_unaligned=1", "--ioengine=psync", "--numjobs=2"),
    "libaio": ("--rw=randwrite", "--bs=8k", "--ioengine=libaio", "--iodepth=8"),
    "mmap": ("--rw=randwrite", "--bs=4k", "--ioengine=mmap"),
    "direct": ("--rw=randwrite", "--bs=16k", "--ioengine=psync", "--direct=1"),
    "direct-libaio": ("--rw=randwrite", "--bs=16k", "--ioengine=libaio", "--iodepth=8", "--direct=1"),
}


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


def fio(directory: Path, *args: str) -> dict[str, int]:
    """Run the job in the directory; gives the bytes it wrote and read."""
    common = (f"--directory={directory}", "--name=job", f"--size={SIZE}", "--fallocate=none", "--randseed=5",
              "--verify=crc32c", "--verify_fatal=1", "--invalidate=1", "--output-format=json")  # fmt: skip
    report = json.loads(run("fio", *common, *args, cwd=directory))
    jobs = report["jobs"]
    assert [job["error"] for job in jobs] == [0] * len(jobs)
    return {way: sum(job[way]["io_bytes"] for job in jobs) for way in ("write", "read")}


@pytest.mark.parametrize("job", JOBS)
def test_verify(place: Place, job: str) -> None:
    if job.startswith("direct") and not direct_io_works(place.source):
        pytest.skip(f"{place.kind} takes no O_DIRECT on this kernel")
    with place.pressure():
        moved = fio(place.path, *JOBS[job], "--do_verify=1", "--end_fsync=1")
    assert moved["write"] >= SIZE // 2
    assert moved["read"] >= moved["write"]
    place.forget()
    for view in (place.path, place.source):
        assert fio(view, *JOBS[job], "--verify_only")["read"] >= moved["write"]
