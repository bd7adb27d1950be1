"""Boot a User-Mode Linux guest and run a command in it as root.

Debian's user-mode-linux is a Linux kernel that runs as an ordinary process and has what the machine's own kernel may
lack: knfsd, lockd and the NFS client. The guest sees the host's root file system read-only (see init.sh), so that it
runs the host's own programs, the Python environment that runs the tests and the checkout they stand in.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
MKFS = {"ext4": ("mke2fs", "-q", "-F", "-t", "ext4"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}
DISK_SIZE = 2 << 30  # sparse
PROGRAMS = ("rpc.nfsd", "mount.nfs", "rpcbind", "modprobe", "ip", "mke2fs", "mkfs.xfs", "mkfs.btrfs")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POWER_OFF_TIME = 30.0
LAB_FAILED = 125  # the status of a run whose guest died before the command ended


class LabError(Exception):
    """The lab cannot run here; the message says what to do."""


def directory() -> Path:
    """Where setup.sh puts the kernel and its modules."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HANDLEFS_LAB_DIR") or Path(cache) / "handlefs-lab")


def kernel() -> tuple[Path, Path]:
    """The kernel and the directory of its modules. Raises LabError when the lab has not been set up."""
    if any(shutil.which(program, path=PATH) is None for program in PROGRAMS):
        raise LabError(f"the NFS tools are missing; run apt-get install {' '.join(packages())}")
    image = directory() / "linux.uml"
    modules = next((directory() / "modules").glob("*/modules.dep"), None)
    if modules is None or not os.access(image, os.X_OK):
        raise LabError(f"no kernel in {directory()}; run {HERE / 'setup.sh'}")
    return image, modules.parent


def packages() -> list[str]:
    """The Debian packages that the guest's programs come from."""
    return (HERE / "packages.txt").read_text().split()


class Guest:
    """A running guest, as a context manager; leaving it kills what still runs.

    `output` collects what the command writes to its standard output and error, `reports` is a descriptor to read what
    it writes to descriptor 3, and `log` is the guest kernel's own log.
    """

    def __init__(self, command: Sequence[str], filesystems: Sequence[str], timeout: float, memory: str = "1G") -> None:
        """Boot; scratch file systems of these kinds (ext4, xfs, btrfs) are mounted at /mnt/KIND."""
        image, modules = kernel()
        self.directory = Path(tempfile.mkdtemp(prefix="handlefs-lab-"))
        self._output = bytearray()
        self._timeout = timeout
        self._configure(command, modules)
        disks = self._make_disks(filesystems)
        self.reports, reports = os.pipe()
        self._console, console = os.pipe()
        # Pipes of our own: UML makes its descriptors non-blocking, which nobody else's would survive.
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(image), f"mem={memory}", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
                    *(f"init={self.directory}/init.sh", f"lab_run={self.directory}"),
                    *(f"uml_dir={self.directory}", "umid=uml"),
                    *("con=null", f"con0=null,fd:{log.fileno()}", "ssl=null"),
                    *(f"ssl0=null,fd:{console}", f"ssl1=null,fd:{reports}", "quiet", "loglevel=5", "panic=-1", *disks),
                ],
                env={**os.environ, "TMPDIR": "/dev/shm"},  # backs the guest's memory
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(log.fileno(), console, reports),
                start_new_session=True,
            )
        os.close(console)
        os.close(reports)
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _configure(self, command: Sequence[str], modules: Path) -> None:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout is read-only in there
        }
        settings = {
            "LAB_PYTHON": sys.executable,
            "LAB_MODULES": str(modules),
            "LAB_TIMEOUT": str(int(self._timeout)),
            "LAB_CWD": str(CHECKOUT),
        }
        shutil.copy(HERE / "init.sh", self.directory)  # the kernel may mount something over the checkout
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (self.directory / "config").write_text("".join(f"{k}={shlex.quote(v)}\n" for k, v in settings.items()))
        (self.directory / "command").write_text(f"{exports}exec {shlex.join(command)}\n")
        visible = {CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), modules}
        (self.directory / "visible").write_text("".join(f"{path}\n" for path in sorted(visible)))

    def _make_disks(self, filesystems: Sequence[str]) -> list[str]:
        """The kernel's arguments for one scratch disk for each file system, and the table that init.sh mounts."""
        arguments, table = [], ""
        for number, kind in enumerate(filesystems):
            image = self.directory / f"{kind}.img"
            with image.open("wb") as disk:
                disk.truncate(DISK_SIZE)
            made = subprocess.run([*MKFS[kind], str(image)], capture_output=True, text=True, check=False)
            if made.returncode != 0:
                raise LabError(f"{MKFS[kind][0]} failed: {made.stderr.strip()}")
            arguments.append(f"ubd{number}={image}")
            table += f"{kind} /dev/ubd{'abcdefgh'[number]}\n"
        (self.directory / "disks").write_text(table)
        return arguments

    def _collect(self) -> None:
        while chunk := os.read(self._console, 1 << 16):
            self._output += chunk

    @property
    def output(self) -> str:
        return self._output.decode(errors="replace")

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def wait(self) -> int:
        """The command's status once the guest has powered off; 124 when it took too long, LAB_FAILED without one."""
        try:
            self._process.wait(self._timeout + POWER_OFF_TIME)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()
        status = self.directory / "status"
        return int(status.read_text()) if status.exists() else LAB_FAILED

    def kill(self) -> None:
        """End the guest's processes, all of which are in the process group that it was started in."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reader.join()
        os.close(self._console)
        os.close(self.reports)
        shutil.rmtree(self.directory)
