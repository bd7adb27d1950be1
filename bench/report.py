"""The report of a result file: tables, between the markers of a page, and pictures beside it.

python -m bench.report [FILE]

If everything in the file was measured in full, the report goes into the project's docs/, with the figures themselves in
performance.json, for later runs to be compared with; else into a page beside the file.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench import command
from bench.errors import BenchError
from bench.figures import DEFAULT_FILE, Part, load, save_small, write
from bench.sections import SECTIONS, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- figures: made by python -m bench.report -->", "<!-- end of the figures -->"
BASELINE = "performance.json"
COMPARED = f"git show HEAD:docs/{BASELINE} > old.json && python -m bench.compare old.json docs/{BASELINE}"
FULL = "full"


def check() -> None:
    """Raise a BenchError now if `write_report` could not work later; a run takes its time."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(
            "matplotlib is not installed, which the pictures need: pip install 'handlefs[bench]', or make bench"
        )


def insert(page: str, text: str) -> str:
    """*page* with *text* between the markers; BenchError unless both are there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after or END in before:
        raise BenchError(f"the page must have the lines '{BEGIN}' and '{END}', once and in this order")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def write_report(results: Path, docs: Path = DOCS) -> Iterable[Path]:
    """Write the report of a result file, into *docs* if all of it is of full scale; gives the files.

    Raises BenchError if that is not possible; then nothing is written.
    """
    check()
    parts = load(results)
    baseline = None
    if all(part.conditions.facts.get("scale") == FULL for part in parts.values()):
        names = {section.page for section in SECTIONS.values()}
        by_page = {docs / name: {part: parts[part] for part in parts if SECTIONS[part].page == name} for name in names}
        texts = {page: _read(page) for page, found in by_page.items() if found}
        baseline = docs / BASELINE
    else:
        page = results.with_suffix(".md")
        by_page, texts = {page: parts}, {page: f"# {results.stem}\n\n{BEGIN}\n{END}\n"}
    for text in texts.values():
        insert(text, "")  # before anything is written
    for page, text in texts.items():
        _write_page(page, text, by_page[page])
    if baseline is not None:
        save_small(baseline, parts)
    return [*texts, *([] if baseline is None else [baseline])]


def _write_page(page: Path, text: str, parts: Mapping[str, Part]) -> None:
    from bench import plots  # noqa: PLC0415 - needs matplotlib, which only the report does

    pictures = plots.draw_all(parts, page)
    write(page, insert(text, markdown(parts, pictures)))


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot read {page}: {error.strerror}") from error


def tell(files: Iterable[Path]) -> None:
    """Say what has been written, and how to compare it with what was there."""
    for file in files:
        print(f"written: {file}")
        if file.name == BASELINE:
            print(f"What became worse since the last commit: {COMPARED}")


def work(arguments: argparse.Namespace) -> int:
    """The command."""
    tell(write_report(arguments.file, arguments.docs))
    return 0


def main() -> int:
    """The exit status: 0, or 1 after a message."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT_FILE, help="result file (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the pages for full scale are")
    arguments = parser.parse_args()
    return command.run("bench.report", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
