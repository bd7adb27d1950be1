"""The command line: real commands, real mounts."""

import contextlib
import errno
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from handlefs import control, nfs
from handlefs import source as source_module
from handlefs.cli.check import _direct, _passthrough
from handlefs.cli.fuseprobe import FuseProtocol, ask_kernel
from handlefs.cli.handle import Node, parse
from handlefs.cli.handle import command as handle_command
from handlefs.cli.main import COMMANDS, cli
from handlefs.config import Config
from handlefs.handle import AT_FDCWD, name_to_handle_at, open_by_handle_at
from handlefs.mount import mount_at, mounts, unmount

from .posix.compare import in_the_end
from .support.cli import HANDLEFS, TIMEOUT, fails, handlefs, ok
from .support.filesystems import FileSystems, filesystem
from .support.meanwhile import meanwhile
from .support.server import mounted
from .support.syscalls import drop_caches, kernel_version

MAN_PAGE = Path(__file__).parents[1] / "docs/handlefs.8"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
both_transports = pytest.mark.parametrize("place", ["default", "pyfuse3"], indirect=True)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own: servers elsewhere on this machine are not its business."""
    directory = tmp_path / "run"
    monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(directory))
    return directory


def restarted_after_a_kill(place: "Place") -> None:
    """`handlefs restart` of a killed server, which says what has happened."""
    done = handlefs("restart", place.path)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"handlefs: the server of .*, was killed, .*: its mount is replaced\n", done.stderr)


class Place:
    """A source, a mount point and the rest of what a server needs."""

    def __init__(self, base: Path, source: Path, mode: str = "default") -> None:
        self.source = source
        self.transport = "pyfuse3" if mode == "pyfuse3" else "direct"
        self.choice = ["--transport", "pyfuse3"] if mode == "pyfuse3" else []
        self.path = base / "mnt"
        self.state_dir = base / "state"
        self.log = base / "log"
        self.path.mkdir()
        (source / "file").write_text("content")
        (source / "dir").mkdir()

    def options(self) -> list[object]:
        return ["--state-dir", self.state_dir, "--log-file", self.log, *self.choice]

    def mount(self, *words: object) -> str:
        return ok(self.source, self.path, *self.options(), *words)

    @property
    def pid(self) -> int:
        return control.server_pid(str(self.path))

    def is_mounted(self) -> bool:
        return mount_at(str(self.path)) is not None

    def kill(self) -> None:
        pid = self.pid
        server = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(server)


def wait_for_end(server: int) -> None:
    """Wait until the process of a pidfd has ended, and close that."""
    poll = select.poll()
    poll.register(server, select.POLLIN)
    ended = poll.poll(TIMEOUT * 1000)
    os.close(server)
    assert ended, "the server still runs"


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, filesystems: FileSystems) -> Iterator[Place]:
    source = filesystems["ext4"] / "cli"
    source.mkdir()
    place = Place(tmp_path, source, getattr(request, "param", "default"))
    yield place
    while place.is_mounted():
        unmount(str(place.path), lazy=True)
    shutil.rmtree(source)


# --- help -----------------------------------------------------------------------------------------------------------


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands by their names, the group itself included."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*path, name))


def test_help_fits_one_screen() -> None:
    lines = ok("--help").splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert ok("-h") == ok("--help")


@pytest.mark.parametrize("name", ["mount", "umount", "status", "evict"])
def test_a_command_imports_neither_another_one_nor_what_draws(name: str) -> None:
    program = (
        "import sys; from handlefs.cli.main import cli\n"
        "cli.main([sys.argv[1], '--help'], standalone_mode=False); print(*sys.modules)"
    )
    asked = [sys.executable, "-c", program, name]
    done = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=60)
    imported = set(done.stdout.splitlines()[-1].split())
    assert f"handlefs.cli.{name}" in imported
    assert not imported & {"rich", "subprocess", *(f"handlefs.cli.{other}" for other in COMMANDS if other != name)}


def as_typed(path: tuple[str, ...], socket: str) -> str:
    """A command's name; those of `client` come after the socket."""
    first, *rest = path
    return " ".join([first, *([socket] if first == "client" and rest else []), *rest])


@pytest.mark.parametrize("path", [path for path, _ in commands() if path], ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    lines = ok(*path, "--help").splitlines()
    assert lines[0].startswith(f"Usage: handlefs {as_typed(path, 'SOCKET')}")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [[], ["map"]])
def test_without_a_command_there_is_help(words: list[str]) -> None:
    done = handlefs(*words)
    assert done.stdout + done.stderr == ok(*words, "--help")


def test_version() -> None:
    assert re.fullmatch(r"handlefs \d+\.\d+\.\d+\n", ok("--version"))


def test_the_man_page_has_every_command_and_option() -> None:
    page = MAN_PAGE.read_text()
    for path, command in commands():
        if path and not isinstance(command, click.Group):
            assert re.search(rf"^\.It Cm {as_typed(path, 'Ar socket Cm')}\b", page, re.MULTILINE), path
        for parameter in command.params:
            for name in parameter.opts if isinstance(parameter, click.Option) else ():
                written = name.lstrip("-") if len(name) == 2 else name[1:].replace("-", r"\-")
                assert f"Fl {written}" in page, (path, name)


def test_the_man_page_is_well_formed() -> None:
    if shutil.which("mandoc"):
        checker = ["mandoc", "-T", "lint", "-W", "warning", str(MAN_PAGE)]
    elif shutil.which("groff"):
        checker = ["groff", "-mdoc", "-ww", "-z", "-T", "utf8", str(MAN_PAGE)]
    else:
        pytest.skip("neither mandoc nor groff is installed")
    done = subprocess.run(checker, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- mounting -------------------------------------------------------------------------------------------------------


@needs_root
@both_transports
def test_mount_and_umount(place: Place) -> None:
    assert place.mount() == ""
    assert (place.path / "file").read_text() == "content"
    assert mount_at(str(place.path)).fstype == "fuse.handlefs"  # type: ignore[union-attr]
    assert mount_at(str(place.path)).source == str(place.source)  # type: ignore[union-attr]
    server = os.pidfd_open(place.pid)
    assert ok("umount", place.path) == ""
    assert not place.is_mounted()
    poll = select.poll()
    poll.register(server, select.POLLIN)
    assert poll.poll(0), "umount must have waited for the server's end"
    os.close(server)
    assert control.servers() == []
    log = place.log.read_text()
    assert f"serving {place.source} at {place.path}" in log
    assert "is unmounted" in log


@needs_root
@both_transports
def test_the_server_leaves_its_callers_world(place: Place) -> None:
    argv = [*HANDLEFS, str(place.source), str(place.path), *map(str, place.options())]
    with (place.source / "file").open() as held:
        subprocess.run(argv, pass_fds=[held.fileno()], cwd=place.source, check=True, timeout=TIMEOUT)
    process = Path(f"/proc/{place.pid}")
    assert os.readlink(process / "cwd") == "/"
    assert {os.readlink(process / f"fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
    assert os.getsid(place.pid) == place.pid
    assert str(place.source / "file") not in open_files(process)
    ok("umount", place.path)


def open_files(process: Path) -> list[str]:
    """What the descriptors of a process lead to; some may be closed meanwhile."""
    found = []
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    assert found
    return found


@needs_root
@both_transports
@pytest.mark.parametrize("words", [["--ro"], ["-o", "ro"], ["-o", "noatime,ro,_netdev,x-systemd.automount"]])
def test_read_only_is_enforced(place: Place, words: list[str]) -> None:
    place.mount(*words)
    with pytest.raises(OSError, match="Read-only") as raised:
        (place.path / "new").write_text("")
    assert raised.value.errno == errno.EROFS
    assert json.loads(ok("status", place.path, "--json"))["read_only"] is True
    ok("umount", place.path)


@needs_root
@both_transports
@pytest.mark.parametrize(
    ("options", "fstype", "source"),
    [
        ("fsname=tank", "fuse", "tank"),
        ("subtype=mirror", "fuse.mirror", None),
        ("fsname=tank,subtype=mirror", "fuse.mirror", "tank"),
    ],
)
def test_fsname_and_subtype_reach_the_mount(place: Place, options: str, fstype: str, source: str | None) -> None:
    place.mount("-o", options)
    mount = mount_at(str(place.path))
    assert mount is not None
    assert (mount.fstype, mount.source) == (fstype, source or str(place.source))
    ok("umount", place.path)


@needs_root
@both_transports
def test_mount_flags_reach_the_mount(place: Place) -> None:
    place.mount("-o", "nosuid,nodev,noexec,noatime")
    assert {"nosuid", "nodev", "noexec", "noatime"} <= set(mount_at(str(place.path)).options.split(","))  # type: ignore[union-attr]
    ok("umount", place.path)


@needs_root
def test_options_of_the_command_line_win_over_those_in_o(place: Place) -> None:
    place.mount("-o", "cache-size=5", "--cache-size", "6", "-o", "submounts=hide")
    config = control.request(str(place.path), {"op": "config"})["config"]
    assert (config["cache_size"], config["submounts"]) == (6, "hide")
    ok("umount", place.path)


@needs_root
@both_transports
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_foreground_stays_until_interrupted(place: Place, number: signal.Signals) -> None:
    """Or until its terminal is closed."""
    argv = [*HANDLEFS, "--foreground", place.source, place.path, "--state-dir", place.state_dir, *place.choice]
    with subprocess.Popen([str(word) for word in argv], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "serving" in server.stderr.readline()
        assert (place.path / "file").read_text() == "content"
        server.send_signal(signal.SIGUSR1)  # means something to systemd alone
        server.send_signal(number)
        assert server.wait(TIMEOUT) == 0
        assert "Traceback" not in server.stderr.read()
    assert not place.is_mounted()


@needs_root
def test_a_start_that_is_ended_leaves_no_mount(place: Place) -> None:
    """SIGTERM at the moment when the mount is there, but is not served."""
    argv = [*HANDLEFS, "--foreground", place.source, place.path, "--state-dir", place.state_dir]
    for _ in range(5):
        with subprocess.Popen([str(word) for word in argv], stderr=subprocess.PIPE, text=True) as server:
            end = time.monotonic() + TIMEOUT
            while not place.is_mounted() and time.monotonic() < end:
                pass
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=TIMEOUT)
            assert "Traceback" not in said
        assert not place.is_mounted()


@pytest.fixture
def foreground(place: Place) -> Iterator["subprocess.Popen[str]"]:
    """A server in the foreground that serves."""
    argv = [*HANDLEFS, "--foreground", place.source, place.path, "--state-dir", place.state_dir]
    words = [str(word) for word in [*argv, "--transport", place.transport]]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert any(" serving " in line for line in server.stderr)
            yield server
        finally:
            server.kill()


@needs_root
@both_transports
@pytest.mark.parametrize("command", ["umount", "umount --lazy", "umount --force"])
def test_unmounting_ends_a_server_well(place: Place, foreground: "subprocess.Popen[str]", command: str) -> None:
    subprocess.run([*command.split(), place.path], check=True)
    _, messages = foreground.communicate(timeout=TIMEOUT)
    assert foreground.returncode == 0
    assert "is unmounted" in messages
    assert "ERROR" not in messages


@needs_root
@both_transports
@pytest.mark.parametrize("how", ["fusectl", "umount --force"])
def test_an_abort_is_a_failure(place: Place, tmp_path: Path, foreground: "subprocess.Popen[str]", how: str) -> None:
    in_use = os.open(place.path, os.O_PATH)
    if how == "fusectl":
        abort(place, tmp_path)
    else:
        done = subprocess.run([*how.split(), place.path], capture_output=True, text=True, check=False)
        assert "busy" in done.stderr
    _, messages = foreground.communicate(timeout=TIMEOUT)
    os.close(in_use)
    assert foreground.returncode == 1
    assert messages.splitlines()[-1].startswith(f"handlefs: the connection to {place.path} was aborted")
    assert "Traceback" not in messages


def abort(place: Place, scratch: Path) -> None:
    """Abort the connection by fusectl."""
    connection = os.stat(place.path).st_dev
    fusectl = scratch / "fusectl"
    fusectl.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", fusectl], check=True)
    try:
        (fusectl / str(os.minor(connection)) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", fusectl], check=True)


@needs_root
@both_transports
def test_sigterm_unmounts_and_the_last_user_ends_the_server(place: Place) -> None:
    place.mount()
    server = os.pidfd_open(place.pid)
    with (place.path / "file").open() as held:
        signal.pidfd_send_signal(server, signal.SIGTERM)
        wait_until_unmounted(place)
        assert json.loads(ok("status", "--json"))[0]["state"] == "detached"
        assert held.read() == "content"
        assert not select.select([server], [], [], 0)[0], "it has ended while its mount is in use"
    wait_for_end(server)
    assert control.servers() == []


@needs_root
@both_transports
def test_the_background_ignores_other_signals(place: Place) -> None:
    """A daemon is often sent SIGHUP so that it reads its configuration again. An upgrade does not change that."""
    place.mount()
    upgrades = 1 if place.transport == "direct" else 0
    for upgrade in range(upgrades + 1):
        if upgrade:
            ok("upgrade", place.path)
        for number in (signal.SIGHUP, signal.SIGUSR1):
            os.kill(place.pid, number)
            ok("evict", place.path)
            assert (place.path / "file").read_text() == "content"
    ok("umount", place.path)


@needs_root
@both_transports
def test_the_background_has_no_manager(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs whatever has started it is told nothing, and gets no descriptors."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        place.mount()
        ok("umount", place.path)
        with pytest.raises(BlockingIOError):
            manager.recv(1000, socket.MSG_DONTWAIT)


@needs_root
@both_transports
def test_restart_leaves_it_to_any_manager(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It would start a server of its own beside the manager's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, meanwhile(lambda: listen(manager), lambda: 0.01):
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        server: subprocess.Popen[str] = request.getfixturevalue("foreground")
        assert re.search("runs this server: .*restart", fails("restart", place.path))
        assert place.pid == server.pid
        ok("umount", place.path)
        assert server.wait(TIMEOUT) == 0


def listen(manager: socket.socket) -> None:
    """Take in what there is."""
    with contextlib.suppress(BlockingIOError):
        while manager.recv(1000, socket.MSG_DONTWAIT):
            pass


def wait_until_unmounted(place: Place) -> None:
    """The kernel flags a change of the mount table to poll(2)."""
    with open("/proc/self/mountinfo") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        while place.is_mounted():
            assert poll.poll(TIMEOUT * 1000), "still mounted"


@needs_root
def test_mistakes_are_told(place: Place, tmp_path: Path) -> None:
    source, path = place.source, place.path
    (source / "inside").mkdir()
    (path / "below").mkdir()
    a_file = tmp_path / "a file"
    a_file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(source / "inside")
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none", path], f"source {tmp_path}/none does not exist"),
        ([a_file, path], f"source {a_file} is not a directory"),
        ([source, tmp_path / "none"], f"mount point {tmp_path}/none does not exist (mkdir -p {tmp_path}/none)"),
        ([source, a_file], f"mount point {a_file} is not a directory"),
        ([source, source / "inside"], "is inside source"),
        ([source, link], "is inside source"),
        ([source, source], "is inside source"),
        ([path / "below", path], "is inside mount point"),
        ([source, path, "--state-dir", source / "inside"], "is inside the source"),
        ([source, path, "--log-file", tmp_path / "none/log"], f"cannot log to {tmp_path}/none/log: No such file"),
        ([source, path, "--key-file", a_file], "is not a key file"),
        (["/proc", path], "no file handles"),
        ([source, path, "--metrics", "no.such.host.invalid:1"], "cannot serve metrics at no.such.host.invalid:1: "),
        (
            [source, path, "--metrics", "192.0.2.1:0"],
            "cannot serve metrics at 192.0.2.1:0: Cannot assign requested address; give another --metrics HOST:PORT",
        ),
    ]
    for words, message in cases:
        assert message in fails(*place.options(), *words), words
        assert not place.is_mounted()
    usage: list[tuple[list[object], str]] = [
        ([source], "MOUNTPOINT"),
        ([source, path, "more"], "more"),
        ([source, path, "-o", "nosiud"], "unknown mount option 'nosiud'; did you mean 'nosuid'?"),
        ([source, path, "-o", "remount,ro"], "remount is not possible"),
        ([source, path, "--cache-size", "lots"], "bad cache-size 'lots'"),
        ([source, path, "--entry-timeout", "-1"], "bad entry-timeout '-1'"),
        ([source, path, "--submounts", "maybe"], "bad submounts 'maybe'"),
        ([source, path, "--transport", "pigeon"], "bad transport 'pigeon'"),
        ([source, path, "--metrics", "9469"], "bad metrics '9469': expected HOST:PORT"),
        ([source, path, "--metrics", "::1:9469"], "bad metrics '::1:9469': expected HOST:PORT"),
        ([source, path, "--metrics", "localhost:65536"], "bad metrics 'localhost:65536'"),
        ([source, path, "--bogus"], "--bogus"),
        ([source, ""], "MOUNTPOINT is empty"),
    ]
    for words, message in usage:
        assert message in fails(*words, status=2), words
    assert control.servers() == []


@pytest.mark.parametrize(
    "name", ["umount", "restart", "reload", "upgrade", "status", "evict", "top", "export", "check", "handle"]
)
def test_an_empty_path_is_not_the_current_directory(name: str) -> None:
    words = ["", *(["*"] if name == "export" else [])]
    assert "is empty" in fails(name, *words, status=2)


@pytest.mark.parametrize(
    ("words", "empty"),
    [
        (["", "/mnt"], "SOURCE"),
        (["serve", "", "--socket", "/run/socket"], "SOURCE"),
        (["client", "", "ls"], "SOCKET"),
        (["client", "/run/socket", "mount", ""], "MOUNTPOINT"),
        (["map", "stats", ""], "SOURCE|MOUNTPOINT"),
        (["map", "rebuild", "/srv", "--key-file", ""], "--key-file"),
        (["handle", "1", "--source", ""], "--source"),
        (["/srv", "/mnt", "--state-dir", ""], "state-dir"),
    ],
)
def test_which_path_is_empty_is_told(words: list[str], empty: str) -> None:
    assert fails(*words, status=2).startswith(f"handlefs: {empty} is empty\n")


@needs_root
@both_transports
def test_a_runtime_directory_without_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with filesystem("tmpfs", "4K") as runtime:
        runtime.chmod(0o700)
        (runtime / "filled").write_bytes(bytes(4096))
        monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(runtime))
        message = fails(place.source, place.path, *place.options())
        assert message == f"handlefs: cannot use the runtime directory {runtime}: No space left on device\n"
        assert not place.is_mounted()
        assert sorted(path.name for path in runtime.iterdir()) == ["filled", "starting"]


@needs_root
@pytest.mark.parametrize("as_client", [False, True])
def test_without_capabilities_it_says_which(place: Place, as_client: bool) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv(1) is not installed")
    words = ["client", "/no/socket", "mount"] if as_client else [str(place.source)]
    argv = ["setpriv", "--bounding-set=-sys_admin,-dac_read_search", *HANDLEFS, *words, str(place.path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 1
    assert "run it as root" in done.stderr
    assert ("CAP_DAC_READ_SEARCH" in done.stderr) is not as_client
    assert "CAP_SYS_ADMIN" in done.stderr


@needs_root
@both_transports
def test_a_second_mount_at_the_same_place_is_refused(place: Place) -> None:
    place.mount()
    message = fails(place.source, place.path, *place.options())
    assert f"{place.path} is already a handlefs mount of {place.source} (process {place.pid})" in message
    assert f"handlefs umount {place.path}" in message
    ok("umount", place.path)


@needs_root
def test_of_two_mounts_at_the_same_time_one_is_refused(place: Place) -> None:
    argv = [*HANDLEFS, *map(str, (place.source, place.path, *place.options()))]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=TIMEOUT)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    assert re.fullmatch("handlefs: .* (being started at|already a handlefs mount).*\n", "".join(said))
    assert [mount.mountpoint for mount in mounts()].count(str(place.path)) == 1
    ok("umount", place.path)


@needs_root
@both_transports
def test_the_dead_mount_of_a_killed_server_is_replaced(place: Place) -> None:
    start = int(time.time())
    place.mount()
    for again in ((place.source, place.path, *place.options()), ("restart", place.path)):
        pid = place.pid
        place.kill()
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.statvfs(place.path)
        assert json.loads(ok("status", "--json"))[0]["state"] == "killed"
        assert "handlefs restart" in fails("status", place.path)
        done = handlefs(*again)
        assert done.returncode == 0
        told = re.search(
            r"the server of (.*), process (.*), was killed, or its mount aborted, at (.*): .*", done.stderr
        )
        assert told is not None
        assert told.group(1, 2) == (str(place.path), str(pid))
        assert start <= time.mktime(time.strptime(told[3], "%Y-%m-%d %H:%M:%S")) <= time.time()
        assert (place.path / "file").read_text() == "content"
    ok("umount", place.path)


@needs_root
@both_transports
def test_an_aborted_connection_can_be_brought_back(place: Place, tmp_path: Path) -> None:
    """fusectl's abort, or umount -f: the mount is dead, the server ends and leaves what restart needs."""
    place.mount()
    server = os.pidfd_open(place.pid)
    abort(place, tmp_path)
    wait_for_end(server)
    assert "was aborted: handlefs restart brings it back" in place.log.read_text()
    done = handlefs("restart", place.path)
    assert (done.returncode, "or its mount aborted, at" in done.stderr) == (0, True)
    assert (place.path / "file").read_text() == "content"
    ok("umount", place.path)


@needs_root
@both_transports
def test_a_source_that_was_removed(place: Place) -> None:
    """What was below it is gone with the right errno, and the server stays until it is unmounted."""
    place.mount("--attr-timeout", "0", "--entry-timeout", "0")
    shutil.rmtree(place.source)
    try:
        for use in (place.path.joinpath("file").read_bytes, place.path.joinpath("new").touch):
            with pytest.raises(FileNotFoundError):
                use()
        assert json.loads(ok("status", place.path, "--json"))["state"] == "serving"
        assert f"source {place.source} does not exist" in fails("restart", place.path)
        ok("umount", place.path)
    finally:
        place.source.mkdir()
    assert not re.search("ERROR|Traceback", place.log.read_text())


def transport_in_use(place: Place) -> str:
    return str(json.loads(ok("status", place.path, "--json"))["transport"])


@needs_root
def test_passthrough_is_not_promised_without_the_direct_transport(place: Place) -> None:
    message = fails(place.source, place.path, *place.options(), "--transport=pyfuse3", "--passthrough=on")
    assert "--transport=direct" in message
    assert not place.is_mounted()


# Old enough to be refused: the real negotiation with the real kernel, with another number for what it asks.
ON_AN_OLD_KERNEL = """
from handlefs.cli.main import main
from handlefs.protocol import abi
abi.OLDEST_MINOR_VERSION = 1000
main()
"""


def mount_on_an_old_kernel(place: Place, *words: object) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-c", ON_AN_OLD_KERNEL, place.source, place.path, *place.options(), *words]
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=TIMEOUT, check=False)


@needs_root
def test_no_room_for_passthrough(place: Place) -> None:
    """A full /dev/shm, seen in a mount namespace of its own, where the handle map's lock files just fit."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare(1) is not installed")

    def start(passthrough: str, then: str) -> "subprocess.CompletedProcess[str]":
        words = [
            *HANDLEFS,
            place.source,
            place.path,
            *place.options(),
            "--transport=direct",
            "--passthrough",
            passthrough,
        ]
        script = f"mount -t tmpfs -o size=160k tmpfs /dev/shm && {shlex.join(map(str, words))} && {then}"
        argv = ["unshare", "--mount", "--propagation=private", "sh", "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    unmount_it = shlex.join([*HANDLEFS, "umount", str(place.path)])
    served = start("auto", f"cat {place.path}/file && {unmount_it}")
    assert (served.returncode, served.stdout) == (0, "content"), served.stderr
    assert re.search("WARNING .* no passthrough .*: No space left on device", place.log.read_text())
    refused = start("on", "true")
    assert refused.returncode == 1
    assert re.fullmatch("handlefs: no passthrough .*/dev/shm: No space left on device; .*\n", refused.stderr)


@needs_root
def test_pyfuse3_serves_where_the_kernel_is_too_old_for_direct(place: Place) -> None:
    done = mount_on_an_old_kernel(place)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place.path / "file").read_text() == "content"
    assert transport_in_use(place) == "pyfuse3"
    (line,) = re.findall(r"WARNING .*", place.log.read_text())
    assert re.search(r"FUSE 7\.\d+; the direct transport needs 7\.1000 or newer: serving with pyfuse3 instead", line)
    assert [mount.mountpoint for mount in mounts()].count(str(place.path)) == 1
    ok("restart", place.path)  # the configuration says auto: on this kernel that is direct
    assert transport_in_use(place) == "direct"
    ok("umount", place.path)


@needs_root
@pytest.mark.parametrize(
    ("words", "advice"),
    [(["--transport=direct"], "--transport=auto or pyfuse3"), (["--passthrough=on"], "use --passthrough=auto")],
    ids=["direct", "passthrough"],
)
def test_what_was_asked_for_is_not_replaced(place: Place, words: list[str], advice: str) -> None:
    done = mount_on_an_old_kernel(place, *words)
    assert done.returncode == 1
    assert re.match(
        r"handlefs: the kernel speaks FUSE 7\.\d+; the direct transport needs 7\.1000 or newer", done.stderr
    )
    assert advice in done.stderr
    assert "Traceback" not in done.stderr
    assert not place.is_mounted()
    assert control.servers() == []


@needs_root
def test_restart_with_the_other_transport(place: Place) -> None:
    """Node IDs, generations and inode numbers are the same, so handles that a client holds stay valid."""
    place.mount()
    assert transport_in_use(place) == "direct"
    held, _ = name_to_handle_at(AT_FDCWD, os.fsencode(place.path / "file"))
    ino = (place.path / "file").stat().st_ino
    for transport in ("pyfuse3", "direct"):
        ok("restart", place.path, "--transport", transport)
        assert transport_in_use(place) == transport
        mount = os.open(place.path, os.O_RDONLY)
        with open(open_by_handle_at(mount, held, os.O_RDONLY)) as file:
            os.close(mount)
            assert (file.read(), os.fstat(file.fileno()).st_ino) == ("content", ino)
    place.kill()
    restarted_after_a_kill(place)
    assert transport_in_use(place) == "direct", "the choice is kept"
    assert "bad transport 'pigeon'" in fails("restart", place.path, "--transport", "pigeon", status=2)
    ok("umount", place.path)


@pytest.mark.parametrize("words", [["statsu"], ["statsu", "/mnt"], ["evcit", "/mnt", "--all"]])
def test_a_mistyped_command_is_no_mount(words: list[str]) -> None:
    assert re.search("no command '(statsu|evcit)'; did you mean 'handlefs (status|evict)'", fails(*words, status=2))


@needs_root
def test_a_source_named_like_a_command(place: Place, tmp_path: Path) -> None:
    (tmp_path / "status").symlink_to(place.source)
    done = handlefs("./status", place.path, *place.options(), cwd=tmp_path)
    assert done.returncode == 0
    assert (place.path / "file").exists()
    ok("umount", place.path)


# --- umount ---------------------------------------------------------------------------------------------------------


@needs_root
@both_transports
def test_umount_says_who_is_in_the_way(place: Place) -> None:
    place.mount()
    (place.path / "program").write_bytes(Path("/bin/sleep").read_bytes())
    (place.path / "program").chmod(0o755)
    with (
        (place.path / "file").open() as held,
        subprocess.Popen(["sleep", "1000"], cwd=place.path / "dir") as inside,
        subprocess.Popen([place.path / "program", "1000"]) as program,
    ):
        message = fails("umount", place.path)
        assert re.search(rf"process {os.getpid()} \(.*\): descriptor {held.fileno()}\n", message)
        assert f"process {inside.pid} (sleep): cwd" in message
        assert f"process {program.pid} (program): exe" in message
        assert f"handlefs umount --lazy {place.path}" in message
        assert (place.path / "file").read_text() == "content"
        inside.kill()
        program.kill()
    ok("umount", place.path)


@needs_root
@both_transports
def test_umount_names_a_mount_on_the_mount(place: Place) -> None:
    place.mount()
    subprocess.run(["mount", "-t", "tmpfs", "none", place.path / "dir"], check=True)
    assert f"a mount at {place.path}/dir" in fails("umount", place.path)
    unmount(str(place.path / "dir"))
    ok("umount", place.path)


@needs_root
@both_transports
def test_lazy_umount_and_a_new_mount_meanwhile(place: Place) -> None:
    place.mount()
    first = os.pidfd_open(place.pid)
    with (place.path / "file").open() as held:
        ok("umount", "--lazy", place.path)
        assert not place.is_mounted()
        place.mount()
        assert held.read() == "content"
    wait_for_end(first)
    assert json.loads(ok("status", place.path, "--json"))["state"] == "serving"
    ok("umount", place.path)


@needs_root
@both_transports
def test_umount_after_the_server_was_killed(place: Place) -> None:
    place.mount()
    held = os.open(place.path / "file", os.O_PATH)
    place.kill()
    ok("umount", place.path)
    os.close(held)
    assert not place.is_mounted()
    assert control.servers() == []


@needs_root
def test_umount_elsewhere_is_refused(place: Place, tmp_path: Path) -> None:
    assert f"nothing is mounted at {place.path}" in fails("umount", place.path)
    subprocess.run(["mount", "-t", "tmpfs", "none", place.path], check=True)
    assert "is not a handlefs mount but one of type tmpfs" in fails("umount", place.path)
    unmount(str(place.path))


@needs_root
@pytest.mark.parametrize("killed", [False, True])
def test_what_is_mounted_over_it_is_left_alone(place: Place, killed: bool) -> None:
    place.mount()
    if killed:
        place.kill()
        unmount(str(place.path), lazy=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", place.path], check=True)
    for command in "umount", "restart":
        assert f"of type tmpfs is mounted over {place.path}: unmount that first" in fails(command, place.path)
        assert mount_at(str(place.path)).fstype == "tmpfs"  # type: ignore[union-attr]
    unmount(str(place.path))
    ok("umount", place.path)
    assert not place.is_mounted()


# --- restart --------------------------------------------------------------------------------------------------------


@needs_root
@both_transports
def test_restart_keeps_configuration_and_handles(place: Place) -> None:
    place.mount("--cache-size", "9", "-o", "noatime", "--entry-timeout", "2.5")
    before = control.request(str(place.path), {"op": "config"})["config"]
    first, handle = place.pid, json.loads(ok("handle", place.path / "file", "--json"))
    ok("restart", place.path)
    assert place.pid != first
    assert control.request(str(place.path), {"op": "config"})["config"] == before
    assert json.loads(ok("handle", place.path / "file", "--json")) == handle
    place.kill()
    restarted_after_a_kill(place)
    assert (place.path / "file").read_text() == "content"
    assert control.request(str(place.path), {"op": "config"})["config"] == before
    ok("umount", place.path)


@needs_root
@both_transports
def test_restart_of_a_busy_mount_changes_nothing(place: Place) -> None:
    place.mount()
    pid = place.pid
    with (place.path / "file").open():
        assert f"process {os.getpid()} (" in fails("restart", place.path)
    assert place.pid == pid
    ok("umount", place.path)


@needs_root
@both_transports
def test_a_restart_that_cannot_work_changes_nothing(place: Place, tmp_path: Path) -> None:
    """What the new server needs is opened before the old one ends."""
    place.log = tmp_path / "logs/log"
    place.log.parent.mkdir()
    key = tmp_path / "keys/key"
    key.parent.mkdir()
    place.mount("--key-file", key, "--cache-size", "100")
    before = place.pid
    for path, message in (
        (place.source, f"source {place.source} does not exist"),
        (place.log.parent, f"cannot log to {place.log}"),
        (key.parent, f"cannot write the key file {key}"),
    ):
        hidden = path.with_name("hidden")
        path.rename(hidden)
        try:
            assert message in fails("restart", place.path)
        finally:
            hidden.rename(path)
    argv = ["prlimit", "--nofile=128", *HANDLEFS, "restart", str(place.path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, "give 64 at most" in done.stderr) == (1, True), done.stderr
    assert place.pid == before
    assert (place.path / "file").exists()
    ok("umount", place.path)


@needs_root
@both_transports
def test_a_failed_restart_says_how_to_go_on(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    place.mount("--metrics", f"127.0.0.1:{port}")
    place.kill()
    with socket.create_server(("127.0.0.1", port)):
        message = fails("restart", place.path)
    assert f"cannot serve metrics at 127.0.0.1:{port}" in message
    (command,) = re.findall(r"^  handlefs (.*)$", message, re.MULTILINE)
    ok(*shlex.split(command))
    assert (place.path / "file").exists()
    ok("umount", place.path)


def test_restart_of_what_never_ran(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        assert f"no handlefs server is known for {tmp_path}" in fails("restart", tmp_path)


# --- status, evict --------------------------------------------------------------------------------------------------


@needs_root
@both_transports
def test_status(place: Place) -> None:
    assert ok("status") == "No handlefs server runs here.\n"
    assert json.loads(ok("status", "--json")) == []
    place.mount()
    (place.path / "file").read_text()
    lines = ok("status").splitlines()
    assert lines[0].split() == ["MOUNTPOINT", "SOURCE", "PID", "STATE"]
    assert lines[1].split() == [str(place.path), str(place.source), str(place.pid), "serving"]
    with (place.path / "file").open():
        # A request is counted after its reply, and close(2) does not wait for RELEASE.
        assert in_the_end(lambda: json.loads(ok("status", place.path, "--json"))["open_files"], 1) == 1
        details = json.loads(ok("status", place.path, "--json"))
        text = ok("status", place.path)
    assert details["pid"] == place.pid
    assert details["source"] == str(place.source)
    assert details["filesystem"]["type"] == "ext4"
    assert details["nodeids"].startswith("inline")
    assert details["operations_total"] > 0
    assert details["transport"] == place.transport
    assert details["exported"] is False
    for label in (
        "pid",
        "source",
        "transport",
        "accelerator",
        "file system",
        "node IDs",
        "inode cache",
        "handle map",
        "open files",
        "operations",
    ):
        assert re.search(rf"^{label}  +\S", text, re.MULTILINE), label
    ok("umount", place.path)


@needs_root
@both_transports
def test_evict(place: Place) -> None:
    place.mount("--cache-size", "100")
    with contextlib.ExitStack() as held:  # else the kernel may forget them, and then so does the server
        for number in range(20):
            (place.path / f"new{number}").mkdir()
            held.callback(os.close, os.open(place.path / f"new{number}", os.O_PATH))

        def cached() -> bool:
            for number in range(20):
                os.listdir(place.path / f"new{number}")
            return bool(json.loads(ok("status", place.path, "--json"))["cache"]["size"] >= 20)

        assert in_the_end(cached, True) is True  # before it was held, another test may have emptied the kernel's caches
        assert ok("evict", place.path, "--count", "3") == "3 evicted\n"
        assert int(ok("evict", place.path, "--all").split()[0]) >= 17
    assert (place.path / "new0").is_dir()
    assert "exclude each other" in fails("evict", place.path, "--all", "--count", "1", status=2)
    assert "--count" in fails("evict", place.path, "--count", "-1", status=2)
    ok("umount", place.path)
    assert "no handlefs server runs" in fails("evict", place.path)


# --- check, handle, export, map, completion -----------------------------------------------------------------------------


def findings(source: Path | str, status: int = 0) -> dict[str, dict[str, str]]:
    done = handlefs("check", source, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


@needs_root
@pytest.mark.parametrize(
    ("kind", "handle", "nodeids"),
    [
        ("ext4", "type 0x1, 8 bytes", "inline"),
        ("xfs", "type 0x81, 12 bytes", "inline"),
        ("btrfs", "type 0x4d, 20 bytes", "mapped"),
        ("tmpfs", "type 0x1, 12 bytes", "mapped"),
    ],
)
def test_check_knows_the_file_system(filesystems: FileSystems, kind: str, handle: str, nodeids: str) -> None:
    found = findings(filesystems[kind])
    assert found["file system"]["detail"].startswith(kind)
    assert found["file handles"] == {"name": "file handles", "verdict": "ok", "detail": handle, "advice": ""}
    assert found["node IDs"]["detail"].startswith(nodeids)
    assert found["CAP_DAC_READ_SEARCH"]["verdict"] == found["CAP_SYS_ADMIN"]["verdict"] == "ok"
    assert re.match(r"7\.\d+: EXPORT_SUPPORT, ", found["FUSE protocol"]["detail"])


@needs_root
def test_check_tries_whether_changes_show_in_their_time(filesystems: FileSystems) -> None:
    """Linux 6.13 gives a change after a look a time of its own, where the file system has room for it."""
    fine = findings(filesystems["ext4"])["change times"]
    assert fine["verdict"] == ("ok" if kernel_version() >= (6, 13) else "limited")
    with filesystem("ext4", mkfs=("-I", "128")) as root:  # times in whole seconds
        before = os.listdir(root)
        coarse = findings(root)["change times"]
        assert os.listdir(root) == before
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        assert "not tried" in findings(root)["change times"]["detail"]
    assert coarse["verdict"] == "limited"
    assert "256-byte inodes" in coarse["advice"]


@needs_root
def test_check_says_what_is_missing(tmp_path: Path) -> None:
    handles = findings("/proc", status=1)["file handles"]
    assert handles["verdict"] == "missing"
    assert "ext4" in handles["advice"]
    assert findings(tmp_path / "none", status=1)["source"]["verdict"] == "missing"
    done = handlefs("check", "/proc")
    assert done.returncode == 1
    assert re.search(r"^missing +file handles .*\n +→ ", done.stdout, re.MULTILINE)


@needs_root
def test_check_without_capabilities(tmp_path: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv(1) is not installed")
    argv = ["setpriv", "--bounding-set=-sys_admin,-dac_read_search", *HANDLEFS, "check", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 1
    assert re.search("^missing +CAP_SYS_ADMIN", done.stdout, re.MULTILINE)
    assert re.search("^missing +CAP_DAC_READ_SEARCH", done.stdout, re.MULTILINE)
    assert re.search("^limited +FUSE protocol", done.stdout, re.MULTILINE)


@needs_root
def test_check_knows_the_direct_transport(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert found["direct"]["verdict"] == "ok"
    offered = "PASSTHROUGH" in ask_kernel().features
    assert found["passthrough"]["verdict"] == ("ok" if offered else "limited")


@needs_root
@pytest.mark.parametrize(("switch", "verdict"), [("on", "ok"), ("off", "limited")])
def test_check_and_status_know_the_accelerator(
    place: Place, monkeypatch: pytest.MonkeyPatch, switch: str, verdict: str
) -> None:
    monkeypatch.setenv("HANDLEFS_ACCELERATOR", switch)
    assert findings(place.source)["accelerator"]["verdict"] == verdict
    place.mount()
    assert json.loads(ok("status", place.path, "--json"))["accelerator"] is (verdict == "ok")
    ok("umount", place.path)


@pytest.mark.parametrize("minor", [30, 38])
def test_check_says_what_keeps_from_direct_and_passthrough(minor: int, tmp_path: Path) -> None:
    protocol = FuseProtocol(7, minor, frozenset())
    direct, passthrough = _direct(protocol), _passthrough(protocol, str(tmp_path))
    assert (direct.verdict == "ok") is (minor >= 31)
    assert direct.verdict == "ok" or ("7.30" in direct.detail and "pyfuse3 serves" in direct.advice)
    assert passthrough.verdict == "limited"
    assert "6.9" in passthrough.advice


@contextlib.contextmanager
def overlay(lower: Path, base: Path) -> Iterator[Path]:
    """An overlayfs over `lower`, with file handles; its own files are on a tmpfs."""
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True)
    try:
        for name in ("upper", "work", "root"):
            (base / name).mkdir()
        layers = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work,index=on,nfs_export=on"
        done = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, base / "root"],
            capture_output=True,
            text=True,
            check=False,
        )
        if "unknown filesystem type" in done.stderr:
            pytest.skip("this kernel has no overlayfs")
        assert done.returncode == 0, done.stderr
        try:
            yield base / "root"
        finally:
            unmount(str(base / "root"))
    finally:
        unmount(str(base))


@needs_root
@pytest.mark.parametrize("content", ["with a file", "empty"])
def test_check_tries_passthrough_on_the_source(tmp_path: Path, content: str) -> None:
    """The kernel passes through to an overlayfs, but not to one on another one."""
    if "PASSTHROUGH" not in ask_kernel().features:
        pytest.skip("this kernel has no passthrough")
    lower = tmp_path / "lower"
    lower.mkdir()
    if content == "with a file":
        (lower / "file").touch()
    with overlay(lower, tmp_path / "first") as first, overlay(first, tmp_path / "second") as second:
        assert findings(lower)["passthrough"]["verdict"] == "ok"
        assert findings(first)["passthrough"]["verdict"] == "ok"
        too_deep = findings(second)["passthrough"]
        assert too_deep["verdict"] == "limited"
        assert "stacked too deep" in too_deep["detail"]
        assert too_deep["advice"]
        assert os.listdir(second) == os.listdir(lower)


@needs_root
@pytest.mark.parametrize(("passthrough", "level"), [("auto", "INFO"), ("on", "WARNING")])
def test_a_source_that_the_kernel_does_not_pass_through_to(tmp_path: Path, passthrough: str, level: str) -> None:
    """It is served all the same, and the log tells once."""
    if "PASSTHROUGH" not in ask_kernel().features:
        pytest.skip("this kernel has no passthrough")
    lower = tmp_path / "lower"
    lower.mkdir()
    told = re.compile(level + " .*does not pass through to some files: Too many levels")
    with (
        overlay(lower, tmp_path / "first") as first,
        overlay(first, tmp_path / "second") as second,
        mounted(second, None, f"--passthrough={passthrough}", "--workers=1", expected_log=told.pattern) as server,
    ):
        for name in ("a", "b"):
            (server.path / name).write_text(name)
            assert (server.path / name).read_text() == name
        assert len(told.findall(server.read_log())) == 1


@needs_root
def test_check_tries_passthrough_on_a_mount_with_passthrough(place: Place) -> None:
    if "PASSTHROUGH" not in ask_kernel().features:
        pytest.skip("this kernel has no passthrough")
    place.mount("--transport", "direct")
    found = findings(place.path)["passthrough"]
    ok("umount", place.path)
    assert "stacked too deep" in found["detail"]


@needs_root
def test_check_tries_passthrough_on_a_source_that_it_must_not_change(tmp_path: Path) -> None:
    if "PASSTHROUGH" not in ask_kernel().features:
        pytest.skip("this kernel has no passthrough")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
    try:
        found = findings(tmp_path)["passthrough"]
    finally:
        unmount(str(tmp_path))
    assert found["verdict"] == "limited"
    assert "not tried" in found["detail"]


@needs_root
def test_check_sees_submounts(place: Place) -> None:
    subprocess.run(["mount", "-t", "proc", "none", place.source / "dir"], check=True)
    try:
        found = findings(place.source)["sub-mounts"]
    finally:
        unmount(str(place.source / "dir"))
    assert found["verdict"] == "limited"
    assert f"{place.source}/dir" in found["detail"]
    assert "--submounts=hide" in found["advice"]


@needs_root
@both_transports
def test_handle_forth_and_back(place: Place) -> None:
    place.mount()
    with (place.source / "file").open():  # keeps the kernel from forgetting its name
        facts: dict[str, Any] = json.loads(ok("handle", place.path / "file", "--json"))
    status = (place.source / "file").stat()
    assert (facts["ino"], facts["path"]) == (status.st_ino, str(place.source / "file"))
    assert facts["mount_path"] == str(place.path / "file")
    assert int(facts["nodeid"], 16) == facts["ino"] << 32 | facts["gen"]
    kernel = name_to_handle(place.path / "file")
    assert facts["nfs_handle"] == kernel
    hexadecimal = kernel.partition(":")[2]
    knfsd = f"01000181{'00000011'}{hexadecimal}"  # NFS handle as on the wire: fsid=17
    nodeid = int(facts["nodeid"], 16)
    with (place.source / "file").open():
        for what in (place.source / "file", facts["nodeid"], nodeid, kernel, hexadecimal, knfsd, facts["handle"]):
            assert json.loads(ok("handle", what, "--json")) == facts, what
        assert json.loads(ok("handle", facts["nodeid"], "--source", place.path, "--json")) == facts
        assert re.search(rf"^node ID +{facts['nodeid']}$", ok("handle", place.path / "file"), re.MULTILINE)
    root = json.loads(ok("handle", place.path, "--json"))
    assert (root["path"], root["mount_path"], int(root["nodeid"], 16)) == (str(place.source), str(place.path), 1)
    assert root["nfs_handle"] == name_to_handle(place.path)

    forged = f"{hexadecimal[:-8]}{int(hexadecimal[-8:], 16) ^ 1:08x}"
    assert "does not belong to node ID" in fails("handle", forged)
    with (place.source / "file").open():
        (place.source / "file").unlink()
        assert re.search("^path +none: removed, but still open", ok("handle", facts["nodeid"]), re.MULTILINE)
    ok("evict", place.path, "--all")
    # Another process that drops the kernel's caches may hold it for an instant.
    assert in_the_end(lambda: handlefs("handle", facts["nodeid"]).returncode, 1) == 1
    assert "stale" in fails("handle", facts["nodeid"])
    assert "stale" in fails("handle", facts["handle"])
    assert "No such file" in fails("handle", place.path / "file")
    assert "neither a path nor a node ID nor a handle" in fails("handle", "nonsense", status=2)
    assert "is not in a source or mount" in fails("handle", "/etc/passwd")
    ok("umount", place.path)
    assert "there are 0 handlefs servers" in fails("handle", "1")
    assert "has no handle map" in fails("handle", "1", "--source", place.source, "--state-dir", place.state_dir / "no")


@needs_root
def test_handle_of_a_path_that_the_kernel_forgets(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the look-up of its name and the opening of its handle: the path is what was given all the same."""

    def forgotten(fd: int, name: bytes) -> object:
        found = name_to_handle_at(fd, name)
        drop_caches(2)
        return found

    monkeypatch.setattr(source_module, "name_to_handle_at", forgotten)
    path = place.source / "dir" / "below"
    path.mkdir()
    (path / "file").touch()
    place.mount()  # makes the map
    ok("umount", place.path)
    words = [str(path / "file"), "--source", str(place.source), "--state-dir", str(place.state_dir), "--json"]
    handle_command.main(words, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["path"] == str(path / "file")


def name_to_handle(path: Path) -> str:
    return str(name_to_handle_at(AT_FDCWD, os.fsencode(path))[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("007", Node(7)),
        ("0X1f", Node(31)),
        (str(2**64 - 1), Node(2**64 - 1)),
        (str(2**64), None),
        ("0", None),
        ("7" * 5001, None),
        ("\u0661", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_node_ids_as_they_are_typed(text: str, expected: Node | None) -> None:
    assert parse(text) == expected


def test_names_that_are_not_utf_8_are_printed(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    runtime.mkdir(mode=0o700)
    record = {"pid": 1, "config": Config("/srv", "/mnt/\udce9").to_dict()}
    (runtime / "0123.json").write_text(json.dumps(record))
    done = subprocess.run([*HANDLEFS, "status"], capture_output=True, check=True, timeout=TIMEOUT)
    assert b"/mnt/\xe9" in done.stdout
    assert not done.stderr


@needs_root
@both_transports
def test_handle_searches_for_a_path(place: Place) -> None:
    place.mount()
    facts = json.loads(ok("handle", place.path / "file", "--json"))
    (place.source / "file").rename(place.source / "dir/new name")
    drop_caches()
    found = json.loads(ok("handle", facts["nodeid"], "--search", "--json"))
    assert found["path"] == str(place.source / "dir/new name")
    ok("umount", place.path)


@needs_root
def test_export_prints_the_line(place: Place) -> None:
    place.mount()
    source_id = json.loads(ok("status", place.path, "--json"))["source_id"]
    number = nfs.fsid(source_id)
    assert ok("export", place.path, "10.0.0.0/8") == f"{place.path} 10.0.0.0/8(rw,no_subtree_check,fsid={number})\n"
    given = ok("export", place.path, "*", "-o", "ro,no_root_squash", "--fsid", "7")
    assert given == f"{place.path} *(no_subtree_check,ro,no_root_squash,fsid=7)\n"
    ok("restart", place.path)
    assert f"fsid={number})" in ok("export", place.path, "client.example")
    assert "use --fsid N" in fails("export", place.path, "*", "-o", "fsid=3")
    assert "bad CLIENT" in fails("export", place.path, "a b", status=2)
    for options in "ro, sync", "ro)*(rw":
        assert "bad -o" in fails("export", place.path, "*", "-o", options, status=2)
    assert "--fsid" in fails("export", place.path, "*", "--fsid", "0", status=2)
    ok("umount", place.path)
    assert "no handlefs server runs" in fails("export", place.path, "*")


@needs_root
def test_what_a_server_on_a_socket_cannot_do(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    ok("serve", place.source, "--socket", path, "--state-dir", place.state_dir, "--log-file", place.log)
    try:
        assert f"to export {place.source}, mount it" in fails("export", path, "*")
        assert "has no --transport" in fails("restart", path, "--transport=direct", status=2)
    finally:
        ok("umount", path)


@needs_root
def test_map_commands(tmp_path: Path, filesystems: FileSystems) -> None:
    source = filesystems["tmpfs"] / "map"
    source.mkdir()
    place, key = Place(tmp_path, source), tmp_path / "key"
    (source / "gone").write_text("")
    place.mount("--key-file", key)
    files = [path.stat().st_ino for path in place.path.iterdir()]
    node = json.loads(ok("handle", place.path / "file", "--json"))
    (place.path / "gone").unlink()
    for where in (place.path, source):
        stats = json.loads(ok("map", "stats", where, "--json"))
        assert (stats["entries"], stats["state_dir"]) == (len(files), str(place.state_dir))
    assert re.search(r"^entries +3$", ok("map", "stats", place.path), re.MULTILINE)
    found = {"live": 2, "unmounted": 0, "dead": 1, "damaged": 0}
    assert in_the_end(lambda: json.loads(ok("map", "verify", place.path, "--json")), found) == found
    assert "a server uses it" in ok("map", "compact", place.path)
    assert ok("map", "verify", place.path) == "2 live\n"
    ok("umount", place.path)
    assert "bytes before" in ok("map", "compact", source, "--state-dir", place.state_dir)

    shutil.rmtree(place.state_dir)
    here = ["--state-dir", place.state_dir]
    assert "--key-file" in fails("map", "rebuild", source, *here)
    assert "does not exist" in fails("map", "rebuild", source, *here, "--key-file", tmp_path / "no key")
    assert "2 files and directories seen, 2 entries" in ok("map", "rebuild", source, *here, "--key-file", key)
    assert json.loads(ok("handle", source / "file", "--source", source, *here, "--json"))["nodeid"] == node["nodeid"]
    shutil.rmtree(source)


@needs_root
def test_an_entry_that_cannot_be_made_durable_is_a_warning(tmp_path: Path, filesystems: FileSystems) -> None:
    """As on a full disk: it is with the recent ones, so what was asked for is true."""
    source = filesystems["tmpfs"] / "volatile"
    source.mkdir()
    place = Place(tmp_path, source)
    for number in range(3000):
        (source / str(number)).touch()
    place.mount()
    assert len([path.stat() for path in place.path.iterdir()]) == 3002
    ok("umount", place.path)
    limit = 65536
    ok("map", "compact", source, "--state-dir", place.state_dir)  # no free pages: it has to grow
    assert (place.state_dir / "map/data.mdb").stat().st_size > limit
    (recent,) = place.state_dir.glob("recent-*")
    shutil.rmtree(recent)  # as after a reboot: new entries have room there
    (source / "new").touch()
    command = [*HANDLEFS, "handle", source / "new", "--source", source, "--state-dir", place.state_dir]
    argv = ["prlimit", f"--fsize={limit}", *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, "node ID" in done.stdout) == (0, True), done.stderr
    assert re.fullmatch("handlefs: new entries of the handle map could not be made durable: .*\n", done.stderr)
    assert json.loads(ok("map", "verify", source, "--state-dir", place.state_dir, "--json"))["live"] == 3003
    shutil.rmtree(source)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_valid(shell: str, tmp_path: Path) -> None:
    script = ok("completion", shell)
    assert "_HANDLEFS_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed, so its script cannot be tried")
    file = tmp_path / "script"
    file.write_text(script)
    subprocess.run([shell, "-n", str(file)], check=True, timeout=TIMEOUT)


def complete(*words: str) -> list[str]:
    environment = {
        "_HANDLEFS_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        HANDLEFS, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    return done.stdout.splitlines()


@needs_root
def test_completion_of_commands_directories_and_mount_points(place: Place) -> None:
    assert "plain,restart" in complete("handlefs", "re")
    assert "dir,/sr" in complete("handlefs", "/sr")
    assert complete("handlefs", "/srv", "/m") == ["dir,/m"]
    assert complete("handlefs", "/srv", "/mnt", "--transport", "p") == ["plain,pyfuse3"]
    assert complete("handlefs", "restart", "/mnt", "--transport", "") == ["plain,auto", "plain,direct", "plain,pyfuse3"]
    place.mount()
    assert complete("handlefs", "umount", "/") == [f"plain,{place.path}"]
    ok("umount", place.path)


# --- mount(8) -------------------------------------------------------------------------------------------------------

HELPER = [sys.executable, "-c", "from handlefs.cli.main import mount_helper; mount_helper()"]


def helper(*words: object) -> "subprocess.CompletedProcess[str]":
    argv = [*HELPER, *(str(word) for word in words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@needs_root
def test_the_mount_helper_takes_what_mount_passes(place: Place) -> None:
    own = f"state-dir={place.state_dir},log-file={place.log},transport=pyfuse3"
    done = helper(place.source, place.path, "-n", "-v", "-o", f"rw,noatime,{own},cache-size=3,dev,suid")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"handlefs: {place.source} mounted on {place.path}\n"
    assert control.request(str(place.path), {"op": "config"})["config"]["cache_size"] == 3
    assert transport_in_use(place) == "pyfuse3"
    ok("umount", place.path)
    assert helper(place.source, place.path, "-o", f"bogus,{own}").returncode == 1
    assert helper(place.source, place.path, "-f", "-o", own).returncode == 0
    assert not place.is_mounted()
    assert helper(place.source, place.path, "-s", "-o", f"bogus,{own}", "-t", "fuse.handlefs").returncode == 0
    ok("umount", place.path)
    assert helper(place.source).returncode == 1
    failed = helper(place.source / "none", place.path, "-o", own)
    assert (failed.returncode, failed.stderr) == (32, f"handlefs: source {place.source}/none does not exist\n")


@needs_root
def test_mount_and_fstab(place: Place, tmp_path: Path) -> None:
    """With the helper in /sbin of a mount namespace of our own, as its place is fixed."""
    script = tmp_path / "helper/mount.fuse.handlefs"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.join(HELPER)} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    fstab = tmp_path / "fstab"
    options = f"state-dir={place.state_dir},log-file={place.log}"
    fstab.write_text(f"{place.source} {place.path} fuse.handlefs noauto,nofail,_netdev,x-a=b,nodev,{options} 0 0\n")
    show, leave = (
        f"grep {shlex.quote(str(place.path))} /proc/self/mountinfo",
        f"{shlex.join(HANDLEFS)} umount {place.path}",
    )
    commands = f"""
        set -e
        mount -t tmpfs none {tmp_path}/layer
        mkdir {tmp_path}/layer/upper {tmp_path}/layer/work
        cp {script} {tmp_path}/layer/upper
        sbin=$(readlink -f /sbin)
        mount -t overlay none -o lowerdir=$sbin,upperdir={tmp_path}/layer/upper,workdir={tmp_path}/layer/work $sbin
        mount -t fuse.handlefs {place.source} {place.path} -o ro,{options}
        {show}; cat {place.path}/file; {leave}
        mount --fstab {fstab} {place.path}
        {show}; cat {place.path}/file; {leave}
        mount -t fuse.handlefs {place.source} {place.path} -o bogus || echo "status $?"
        """
    (tmp_path / "layer").mkdir()
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", commands]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    first, second = re.findall(rf"{place.path} (\S+) .*- (?:fuse.handlefs) {place.source} ", done.stdout)
    assert "ro" in first.split(",")
    assert "nodev" in second.split(",")
    assert done.stdout.count("content") == 2
    assert "unknown mount option 'bogus'" in done.stderr
    assert done.stdout.endswith("status 1\n")
