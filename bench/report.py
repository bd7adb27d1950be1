"""The report of a result file: tables in docs/performance.md, between its markers, and pictures beside it.

python -m bench.report [FILE] [--docs DIR]
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from bench import plots
from bench.errors import BenchError
from bench.figures import DEFAULT_FILE, Part, load, write
from bench.sections import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "performance.md"
BEGIN, END = "<!-- figures: made by python -m bench.report -->", "<!-- end of the figures -->"


def insert(page: str, text: str) -> str:
    """*page* with *text* between the markers; BenchError unless both are there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after or END in before:
        raise BenchError(f"the page must have the lines '{BEGIN}' and '{END}', once and in this order")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def write_docs(parts: Mapping[str, Part], docs: Path) -> None:
    """Write the pictures to *docs*, and the tables into the page there. BenchError if that is not possible."""
    path = docs / PAGE
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    insert(page, "")  # before anything is written
    pictures = plots.draw_all(parts, docs)
    write(path, insert(page, markdown(parts, pictures)))


def main() -> int:
    """The exit status: 0, or 1 after a message."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT_FILE, help="result file (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help=f"where {PAGE} is and the pictures go")
    arguments = parser.parse_args()
    try:
        write_docs(load(arguments.file), arguments.docs)
    except BenchError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
