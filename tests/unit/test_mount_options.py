"""Mount options as fstab and mount(8) pass them, and the mount table."""

import errno
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs import mount
from handlefs.config import MOUNT_OPTIONS
from handlefs.mount import MountOptions, OptionError, parse_mountinfo, parse_options

WORDS = ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "sync", "dirsync", "lazytime"]
# What stands in /proc: any bytes but NUL, as the file system gives them.
NAMES = st.binary(min_size=1).filter(lambda name: b"\0" not in name).map(os.fsdecode)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def flags(text: str) -> int:
    return parse_options(text, MOUNT_OPTIONS)[0].flags()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("defaults", 0),
        ("rw,suid,dev,exec,async,atime", 0),
        ("ro", mount.MS_RDONLY),
        ("nosuid,nodev,noexec", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC),
        ("noatime,nodiratime", mount.MS_NOATIME | mount.MS_NODIRATIME),
        ("relatime", mount.MS_RELATIME),
        ("strictatime", mount.MS_STRICTATIME),
        ("lazytime", mount.MS_LAZYTIME),
        ("nosymfollow", mount.MS_NOSYMFOLLOW),
        ("sync,dirsync", mount.MS_SYNCHRONOUS | mount.MS_DIRSYNC),
        ("user", mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC),
        ("owner", mount.MS_NOSUID | mount.MS_NODEV),
    ],
)
def test_words_become_flags(text: str, expected: int) -> None:
    assert flags(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ro,rw", 0),
        ("rw,ro", mount.MS_RDONLY),
        ("nodev,dev", 0),
        ("user,exec", mount.MS_NOSUID | mount.MS_NODEV),
        ("ro,nosuid,defaults", 0),
        ("sync,async", 0),
        ("noatime,atime", 0),
    ],
)
def test_the_last_word_wins(text: str, expected: int) -> None:
    assert flags(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "_netdev,nofail,noauto,auto,x-systemd.automount,X-mount.mkdir=0755,x-gvfs-hide",
        "allow_other,default_permissions,nonempty",
        "comment=for the backup,user=fred,helper=udisks2,,",
    ],
)
def test_options_for_others_are_accepted(text: str) -> None:
    assert parse_options(text, MOUNT_OPTIONS) == (MountOptions(), {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bogus", "'bogus'"),
        ("ro,bogus=1,nosuid", "'bogus'"),
        ("nosiud", "did you mean 'nosuid'"),
        ("cache_size=3", "did you mean 'cache-size'"),
        ("ro=1", "'ro=1'"),
        ("fsname", "'fsname'"),
        ("cache-size", "needs a value"),
        ("state-dir=", "needs a value"),
        ("remount,ro", "handlefs umount"),
    ],
)
def test_a_bad_option_is_named(text: str, named: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_options(text, MOUNT_OPTIONS)
    assert named in str(raised.value)


def test_sloppy_drops_unknown_options_alone() -> None:
    options, own = parse_options("bogus,ro,other=1,cache-size=5", MOUNT_OPTIONS, sloppy=True)
    assert (options, own) == (MountOptions(read_only=True), {"cache-size": "5"})


def test_own_options_are_told_apart() -> None:
    options, own = parse_options("noatime,cache-size=10,state-dir=/var/x,submounts=hide", MOUNT_OPTIONS)
    assert options == MountOptions(noatime=True)
    assert own == {"cache-size": "10", "state-dir": "/var/x", "submounts": "hide"}


@pytest.mark.parametrize(
    ("text", "fstype", "device"),
    [
        ("", "fuse.handlefs", "/srv"),
        ("subtype=mirror", "fuse.mirror", "/srv"),
        ("fsname=tank", "fuse", "tank"),
        ("fsname=tank,subtype=mirror", "fuse.mirror", "tank"),
        ("fsname=,subtype=", "fuse", ""),
    ],
)
def test_fsname_and_subtype_name_the_mount(text: str, fstype: str, device: str) -> None:
    options, _ = parse_options(text, MOUNT_OPTIONS)
    assert (options.fstype(), options.device("/srv")) == (fstype, device)


def test_a_backslash_protects_a_comma() -> None:
    options, own = parse_options(r"fsname=a\,b\\c,state-dir=/x\,ro,ro", MOUNT_OPTIONS)
    assert options == MountOptions(read_only=True, fsname=r"a,b\c")
    assert own == {"state-dir": "/x,ro"}


@given(st.sets(st.sampled_from(WORDS)), st.none() | st.text(), st.none() | st.text())
def test_the_argument_round_trips(words: set[str], fsname: str | None, subtype: str | None) -> None:
    named = {"read_only" if word == "ro" else word: True for word in words}
    options = MountOptions(**named, fsname=fsname, subtype=subtype)
    assert parse_options(options.to_argument(), MOUNT_OPTIONS) == (options, {})


def test_a_dictionary_of_another_version_is_read() -> None:
    options = MountOptions(noexec=True, fsname="x")
    assert MountOptions.from_dict(asdict(options) | {"of_tomorrow": 1}) == options


def escape(name: bytes) -> bytes:
    """As the kernel does (fs/seq_file.c, mangle_path)."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in name)


@given(NAMES, NAMES)
def test_mountinfo_names_are_decoded(mountpoint: str, source: str) -> None:
    line = b"36 35 98:0 /sub %s rw,noatime master:1 shared:2 - fuse.handlefs %s rw,user_id=0\n" % (
        escape(os.fsencode(mountpoint)),
        escape(os.fsencode(source)),
    )
    (found,) = parse_mountinfo(line)
    assert (found.mount_id, found.parent_id, found.dev, found.root) == (36, 35, (98, 0), "/sub")
    assert (found.mountpoint, found.source) == (mountpoint, source)
    assert (found.options, found.fstype, found.super_options) == ("rw,noatime", "fuse.handlefs", "rw,user_id=0")


def test_a_mount_without_source_is_read() -> None:
    (found,) = parse_mountinfo(b"36 35 0:5 / /mnt rw - tmpfs  rw\n")
    assert (found.source, found.super_options) == ("", "rw")


@needs_root
def test_the_topmost_of_stacked_mounts_is_found(tmp_path: Path) -> None:
    point = tmp_path / "a place"
    point.mkdir()
    assert mount.mount_at(str(point)) is None
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        for name in ("below", "above"):
            mount.mount_fuse(name, str(point), "fuse.x", mount.MS_RDONLY, MountOptions().fuse_data(device))
            os.close(device)
            device = os.open("/dev/fuse", os.O_RDWR)
        top = mount.mount_at(str(point))
        assert top is not None
        assert (top.source, top.fstype) == ("above", "fuse.x")
        assert top.options.split(",")[0] == "ro"
        assert mount.canonical(f"{tmp_path}/./a place/") == str(point)  # both are dead: nothing may be asked of them
        assert [below.mountpoint for below in mount.mounts_below(str(tmp_path))] == [str(point)] * 2
    finally:
        os.close(device)
        while mount.mount_at(str(point)):
            mount.unmount(str(point), lazy=True)


@needs_root
def test_errors_of_mounting_say_where(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        mount.mount_fuse("x", str(tmp_path / "none"), "fuse", 0, MountOptions().fuse_data(-1))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(tmp_path / "none"))
    with pytest.raises(OSError, match="Invalid argument") as raised:
        mount.unmount(str(tmp_path))
    assert (raised.value.errno, raised.value.filename) == (errno.EINVAL, str(tmp_path))


def test_a_link_is_followed_unless_it_is_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert mount.canonical(str(tmp_path / "link")) == str((tmp_path / "real").resolve())
    assert mount.canonical("/") == "/"
    assert mount.canonical("/proc/../proc/") == "/proc"
