"""Part `nfs`: a directory that knfsd exports, beside the same with handlefs in between, for a client of NFSv3 and v4.2.

It runs in the lab of the tests (tests/lab): server and client are one User-Mode Linux guest with one CPU and its own
kernel, so only the ratios say something.
"""

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from bench.errors import BenchError, UnavailableError
from bench.figures import Conditions, Figure, Part
from bench.plan import Plan
from bench.sizes import Sizes
from tests.lab.guest import Guest, LabError

FILESYSTEM = "ext4"
WORKLOADS = (
    "stat-cold", "ls-cold", "open", "create", "rename", "unlink", "mkdir", "read-4k", "write-4k",
    "seq-read-cold", "rand-read-cold", "rand-read", "seq-write", "rand-write",
)  # fmt: skip
BOOT_SECONDS = 120
MINUTES = 4.0
PATIENCE_SECONDS = 900
"""More than `MINUTES`: some rounds are done in any case."""


def measure(plan: Plan) -> Part:
    """The part `nfs`; UnavailableError if there is no lab on this machine."""
    workloads = [name for name in WORKLOADS if name in plan.workloads]
    if not workloads:
        raise BenchError(f"none of these workloads is in this part: {', '.join(plan.workloads)}")
    plan.steps.expect(1)
    plan.steps.step("booting the guest")
    sizes = guest_sizes(plan.sizes)
    arguments = [FILESYSTEM, json.dumps(asdict(sizes)), str(plan.seed), *workloads]
    command = [sys.executable, "-m", "bench.nfsguest", *arguments]
    patience = BOOT_SECONDS + PATIENCE_SECONDS
    try:
        with Guest(command, [FILESYSTEM], patience + 120) as guest:
            for told in _lines(guest, patience):
                if "step" in told:
                    plan.steps.step(told["step"])
                elif "expect" in told:
                    plan.steps.expect(told["expect"])
                else:
                    return _part(plan, told)
            raise BenchError(f"the guest has ended with status {guest.wait()}:\n{guest.output[-2000:]}")
    except LabError as error:
        raise UnavailableError(str(error)) from error


def guest_sizes(sizes: Sizes) -> Sizes:
    """What suits a machine with one slow CPU."""
    return replace(
        sizes,
        small=min(sizes.small, 500),
        calls=min(sizes.calls, 300),
        changes=min(sizes.changes, 200),
        data_mib=min(sizes.data_mib, 16),
        random=min(sizes.random, 500),
        sources=1,
        compiled=1,
        rounds=min(sizes.rounds, 7),
        minutes=min(sizes.minutes, MINUTES),
    )


def _lines(guest: Guest, patience: float) -> Iterator[dict[str, Any]]:
    """What the guest tells, until it ends. Raises BenchError if it has not ended after *patience* seconds."""
    deadline, buffer = time.monotonic() + patience, b""
    while select.select([guest.reports], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(guest.reports, 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from map(json.loads, lines)
    raise BenchError(f"the guest has told nothing in {patience:.0f} s:\n{guest.output[-2000:]}")


def _part(plan: Plan, told: dict[str, Any]) -> Part:
    """The guest's figures, labelled with the guest's kernel."""
    figures = [Figure(**{**figure, "samples": tuple(figure["samples"])}) for figure in told["figures"]]
    here = plan.conditions(order=plan.order)
    guest = {"kernel": f"{told['kernel']} (User-Mode Linux, 1 CPU)", "file system": FILESYSTEM, **told["facts"]}
    return Part(Conditions({**here.facts, **guest}), figures)
