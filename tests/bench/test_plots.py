"""What the pictures show: looked up in matplotlib's own objects, as nobody looks at pixels here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from matplotlib import pyplot as plt
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure as Picture

from bench import plots
from bench.figures import GIVEN_UP

from .make import figure, part


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def labels(picture: Picture) -> list[str]:
    [legend] = picture.legends
    return [text.get_text() for text in legend.get_texts()]


def test_numbers_are_written_out_on_logarithmic_axes() -> None:
    pauses = [figure("pause", [2, 30, 400], table="restart", row=row, unit="ms") for row in ("nothing", "reload")]
    picture = plots._restart(part(*pauses))
    assert picture is not None
    picture.canvas.draw()
    shown = [text.get_text() for text in picture.axes[0].get_xticklabels()]
    assert {"10", "100"} <= set(shown)


def test_speed_is_shown_beside_the_directory_and_beside_c() -> None:
    names = ("native", "direct", "passthrough_ll", "bindfs")
    figures = [figure(name, [1, 2, 3], row=row) for row in ("open", "create") for name in names]
    picture = plots._speed(part(*figures))
    assert picture is not None
    about = [axes.get_xlabel().splitlines()[0] for axes in picture.axes]
    assert about == ["speed relative to the directory itself", "speed relative to passthrough_ll"]
    assert labels(picture) == ["direct", "passthrough_ll", "bindfs"]
    bars = [container for container in picture.axes[0].containers if isinstance(container, ErrorbarContainer)]
    markers = [container.lines[0].get_marker() for container in bars]
    assert len(set(markers)) == len(markers) == 3


def test_without_the_server_in_c_there_is_one_panel() -> None:
    picture = plots._speed(part(figure("native", [1]), figure("direct", [2])))
    assert picture is not None
    assert len(picture.axes) == 1
    assert plots._speed(part(figure("direct", [2]), figure("bindfs", [2]))) is None


def test_who_failed_and_who_was_given_up_have_marks_of_their_own() -> None:
    figures = [
        figure(name, samples, table=table, row=row, unit="MiB", failure=failure)
        for table in ("growth-memory", "growth-descriptors")
        for name, row, samples, failure in (
            ("direct", "1000", [20], ""),
            ("direct", "9000", [21], ""),
            ("passthrough_ll", "1000", [1000], ""),
            ("passthrough_ll", "9000", [], "Too many open files, after 2,000 inodes"),
            ("bindfs", "1000", [2], ""),
            ("bindfs", "9000", [], f"{GIVEN_UP}: not within 75 s, after 3,000 inodes"),
        )
    ]
    picture = plots._growth(part(*figures))
    assert picture is not None
    assert labels(picture) == ["direct", "passthrough_ll", "bindfs", "failed", f"{GIVEN_UP}: not within 75 s"]
    marks = {line.get_label(): line.get_marker() for line in picture.axes[0].lines}
    assert marks["failed"] != marks[f"{GIVEN_UP}: not within 75 s"]
