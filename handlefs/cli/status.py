"""``handlefs status``."""

import shlex
from typing import Any

import click

from handlefs import control, nfs
from handlefs.cli.params import MOUNTPOINT, doing, json_option, print_json, print_table, short_time
from handlefs.metrics import quantile
from handlefs.mount import canonical, mount_at


@click.command("status", short_help="Show the servers, or one in detail.")
@click.argument("mountpoint", required=False, type=MOUNTPOINT)
@json_option
def command(mountpoint: str | None, as_json: bool) -> None:
    """Show the server of MOUNTPOINT in detail, or list all servers, those that were killed too."""
    if mountpoint is not None:
        details = _details(canonical(mountpoint))
        print_json(details) if as_json else _print_details(details)
        return
    known = [_summary(record) for record in control.servers()]
    if as_json:
        print_json(known)
    elif known:
        _print_list(known)
    else:
        click.echo(f"No handlefs server runs here{control.not_root()}.")


def _details(mountpoint: str) -> dict[str, Any]:
    try:
        reply = control.request(mountpoint, {"op": "status"})
    except control.NoServer as error:
        record = control.record(mountpoint)
        if record is None:
            raise
        raise click.ClickException(
            f"{record.obituary()}: bring it back with handlefs restart {shlex.quote(mountpoint)}"
        ) from error
    del reply["ok"]
    state = _state(mountpoint, True, socket=reply["transport"] == "socket")
    return reply | {"state": state, "exported": nfs.exported(mountpoint)}


def _summary(record: control.Record) -> dict[str, Any]:
    return {
        "mountpoint": record.mountpoint,
        "source": record.config.source,
        "pid": record.pid,
        "state": _state(record.mountpoint, record.alive(), socket=record.config.socket),
    }


def _state(mountpoint: str, alive: bool, *, socket: bool) -> str:
    if not alive:
        return "killed"
    if socket:
        return "serving"
    # After a lazy unmount the server stays for those who still use the mount.
    return "serving" if mount_at(mountpoint) else "detached"


def _print_list(known: list[dict[str, Any]]) -> None:
    print_table([[str(value) for value in server.values()] for server in known], [name.upper() for name in known[0]])


def _print_details(details: dict[str, Any]) -> None:
    print_table(([(name, "bold")], value) for name, value in _rows(details))


def _rows(details: dict[str, Any]) -> list[tuple[str, str]]:
    """The details in words; what this version has no words for comes last, as it is."""
    rest = dict(details)
    filesystem, cache, handle_map = rest.pop("filesystem"), rest.pop("cache"), rest.pop("map")
    uptime, per_second, total = rest.pop("uptime"), rest.pop("operations_per_second"), rest.pop("operations_total")
    nodes = rest.pop("node_table", None)
    asked = cache["hits"] + cache["misses"]
    hits = f", {cache['hits'] / asked:.1%} hits" if asked else ""
    rows = [(name.replace("_", " "), _plain(rest.pop(name))) for name in ("mountpoint", "source", "state", "pid")]
    rows += [
        ("up for", _duration(uptime)),
        ("file system", f"{filesystem['type']} ({filesystem['identity']})"),
        ("node IDs", _plain(rest.pop("nodeids"))),
        ("inode cache", f"{cache['size']:,} of {cache['capacity']:,}{hits}, {cache['evictions']:,} evictions"),
        ("handle map", f"{handle_map['entries']:,} entries, {handle_map['bytes']:,} bytes"),
        ("operations", f"{total:,}, {per_second:.1f} per second now{_counts(rest.pop('operations'))}"),
        ("latency", _latency([each["buckets"] for each in rest.pop("latency").values()])),
        ("errors", _counts(rest.pop("errors")).removeprefix(": ") or "none"),
        ("errors by number", _counts(rest.pop("errnos")).removeprefix(": ") or "none"),
    ]
    if rest.get("metrics") is None:
        rest.pop("metrics", None)
    rows += [("worker", _worker(worker)) for worker in rest.pop("workers", ())]
    if nodes is not None:
        counts = f"{nodes['given']:,} given, {nodes['forgotten']:,} forgotten"
        rows.append(("node table", f"{nodes['size']:,} of {nodes['capacity']:,} for each peer, {counts}"))
    return rows + [(name.replace("_", " "), _plain(value)) for name, value in rest.items()]


def _latency(buckets: list[list[int]]) -> str:
    if not buckets:
        return "nothing was asked yet"
    counts = [sum(column) for column in zip(*buckets, strict=True)]
    return f"half within {short_time(quantile(counts, 0.5))}, 99% within {short_time(quantile(counts, 0.99))}"


def _worker(worker: dict[str, Any]) -> str:
    counts = f"{worker['operations_total']:,} operations", f"{worker['cpu_seconds']:.1f} s of CPU", doing(worker)
    return f"process {worker['pid']}: {', '.join(filter(None, counts))}"


def _counts(counts: dict[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ": " + ", ".join(f"{name} {count:,}" for name, count in most) if most else ""


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((index for index, (value, _) in enumerate(parts) if value), len(parts) - 1)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2])
