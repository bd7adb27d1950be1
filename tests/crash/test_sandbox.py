"""Workers have no privilege that serving requests does not need, and every one that it does."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from handlefs.credentials import CAP_CHOWN, CAP_MKNOD, CAP_SETUID, has_capability
from handlefs.sandbox import CAPABILITIES, needed

from ..posix.compare import attributes, outcome
from ..support.filesystems import FileSystems
from ..support.server import mounted
from ..support.syscalls import FS_IMMUTABLE_FL, set_flags
from ..support.users import ALICE, BOB, Child, as_user
from .conftest import TIMEOUT
from .processes import children, stopped

CAPABILITY_OF_A_FILE = struct.pack("=5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep


def has_all_capabilities() -> bool:
    """Whether this process, as that of root outside of containers, could give handlefs whatever it may want."""
    return all(map(has_capability, CAPABILITIES))


@pytest.mark.skipif(not has_all_capabilities(), reason="this container has not all capabilities")
@pytest.mark.parametrize(("passthrough", "access"), [("auto", "rw"), ("off", "rw"), ("auto", "ro")])
def test_privileges(kind: str, filesystems: FileSystems, passthrough: str, access: str) -> None:
    source = filesystems[kind] / f"privileges-{passthrough}-{access}"
    source.mkdir(mode=0o777)
    kept = sum(1 << number for number in needed(read_only=access == "ro"))
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}", "-o", access) as server:
        for pid in children(server.pid):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
                assert status["NoNewPrivs"] == "1"
                found = {name: int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
                assert found == {"CapEff": kept, "CapPrm": kept, "CapBnd": kept, "CapInh": 0, "CapAmb": 0}


def privileged_operations(base: Path) -> list[object]:
    """One operation for each capability of a worker, and how it ends."""
    secret, own = base / "secret", base / "own"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    os.chown(secret, ALICE.uid, ALICE.gid)
    results: list[object] = [attributes(secret)]
    results.append(as_user(ALICE, secret.read_bytes))
    results.append(outcome(as_user, BOB, secret.read_bytes))
    results.append(outcome(as_user, ALICE, own.write_bytes, b"own"))
    results.append(attributes(own))
    results.append(outcome(as_user, ALICE, lambda: os.chmod(own, 0o4711)))
    results.append(attributes(own))
    results.append(outcome(as_user, ALICE, lambda: os.utime(own, (1, 2))))
    results.append(own.stat().st_mtime)
    results.append(outcome(own.write_bytes, b"by root"))  # keeps the set-id bit
    results.append(attributes(own))
    results.append(outcome(os.mknod, base / "null", 0o020666, os.makedev(1, 3)))
    results.append(attributes(base / "null"))
    for name, value in (("trusted.one", b"1"), ("security.capability", CAPABILITY_OF_A_FILE)):
        results.append(outcome(os.setxattr, own, name, value))
        results.append(outcome(os.getxattr, own, name))
    results.append(outcome(set_flags, secret, FS_IMMUTABLE_FL))
    results.append(outcome(secret.write_bytes, b"changed"))
    results.append(outcome(set_flags, secret, 0))
    results.append(outcome(secret.unlink))
    return results


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_privileged_operations(kind: str, filesystems: FileSystems, passthrough: str) -> None:
    base = filesystems[kind] / f"privileged-{passthrough}"
    source, control = base / "source", base / "control"
    for path in (source, control):
        path.mkdir(parents=True)
        path.chmod(0o777)
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}") as server:
        assert privileged_operations(server.path) == privileged_operations(control)


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_a_read_only_mount(kind: str, filesystems: FileSystems, passthrough: str) -> None:
    """Fewer privileges are enough to read all that there is, and list it with O_NOATIME."""
    assert {CAP_CHOWN, CAP_SETUID, CAP_MKNOD} & set(needed(read_only=True)) == set()
    source = filesystems[kind] / f"read-only-{passthrough}"
    source.mkdir()
    secret = source / "hidden" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    os.setxattr(secret, "trusted.one", b"1")
    for path, mode in ((secret, 0o400), (secret.parent, 0o700)):
        path.chmod(mode)
        os.chown(path, ALICE.uid, ALICE.gid)
        os.utime(path, (1, 2))
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}", "-o", "ro") as server:
        path = server.path / "hidden" / "secret"
        assert as_user(ALICE, path.read_bytes) == b"secret"
        assert outcome(as_user, BOB, path.read_bytes) == "EACCES"
        assert os.getxattr(path, "trusted.one") == b"1"
        assert os.listdir(path.parent) == ["secret"]
        assert outcome(path.write_bytes, b"") == "EROFS"
    assert secret.parent.stat().st_atime == 1


def test_many_descriptors_on_their_way(kind: str, filesystems: FileSystems) -> None:
    """The supervisor is stopped, so what workers hand over is not received: more than one process may have on its way
    (unix(7), ETOOMANYREFS), with a low limit. Files are removed all the same."""
    source = filesystems[kind] / "on-their-way"
    source.mkdir()
    with mounted(source, None, "--transport=direct", "--passthrough=off", nofile=100) as server:

        def client() -> list[object]:
            paths = [server.path / str(number) for number in range(400)]
            for path in paths:
                path.touch()
            with stopped(server.pid):
                return [outcome(path.unlink) for path in paths]

        assert Child(client).result(TIMEOUT) == [None] * 400


def test_check_tells_what_is_missing(kind: str, filesystems: FileSystems) -> None:
    argv = ["setpriv", "--bounding-set=-setuid,-setpcap", sys.executable, "-m", "handlefs", "check", "--json"]
    done = subprocess.run([*argv, filesystems[kind]], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    limited = {finding["name"] for finding in json.loads(done.stdout) if finding["verdict"] == "limited"}
    assert {"CAP_SETUID", "CAP_SETPCAP"} <= limited
    assert not limited & {"CAP_SETGID", "CAP_CHOWN"}
