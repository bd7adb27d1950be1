"""A C project built with make: time stamps decide what is rebuilt, and must not change under anybody's feet."""

from __future__ import annotations

import re
from pathlib import Path

from .place import Place, run, wait_for_tick

MODULES = 8

MAKEFILE = """\
CFLAGS := -O1 -Wall -Werror -MMD -MP -Iinclude
AR := ar
ARFLAGS := rcsD
OBJECTS := $(patsubst src/%.c,build/%.o,$(wildcard src/*.c))

all: bin/total bin/first

bin/%: build/main/%.o build/libparts.a | bin
\t$(CC) -o $@ $^

build/libparts.a: $(OBJECTS)
\trm -f $@ && $(AR) $(ARFLAGS) $@ $^

build/%.o: src/%.c | build
\t$(CC) $(CFLAGS) -c -o $@ $<

build/main/%.o: main/%.c | build/main
\t$(CC) $(CFLAGS) -c -o $@ $<

bin build build/main:
\tmkdir -p $@

clean:
\trm -rf bin build

.PHONY: all clean
.PRECIOUS: build/%.o build/main/%.o
-include $(wildcard build/*.d build/main/*.d)
"""


def write_project(root: Path) -> None:
    """Module N uses its own header and that of module N-1; `total` adds them all up, `first` prints the first."""
    for directory in ("src", "include", "main"):
        (root / directory).mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    for n in range(MODULES):
        (root / f"include/part{n}.h").write_text(f"#pragma once\n#define PART{n} {n + 1}\nint part{n}(void);\n")
        below = f'#include "part{n - 1}.h"\n' if n else ""
        call = f" + part{n - 1}()" if n else ""
        (root / f"src/part{n}.c").write_text(
            f'#include "part{n}.h"\n{below}int part{n}(void) {{ return PART{n}{call}; }}\n'
        )
    for program, part in (("total", MODULES - 1), ("first", 0)):
        (root / f"main/{program}.c").write_text(
            f'#include <stdio.h>\n#include "part{part}.h"\n'
            f'int main(void) {{ return !printf("%d\\n", part{part}()); }}\n'
        )


def compiled(output: str) -> set[str]:
    return set(re.findall(r"-c -o \S+ (\S+\.c)", output))


def make(root: Path, *args: str) -> str:
    return run("make", "--no-print-directory", "-j2", *args, cwd=root)


def test_build_and_rebuild(place: Place) -> None:
    root = place.path
    sources = {f"src/part{n}.c" for n in range(MODULES)} | {"main/total.c", "main/first.c"}
    with place.pressure():
        write_project(root)
        assert compiled(make(root)) == sources
        assert run(root / "bin/total").split() == [str(sum(range(1, MODULES + 1)))]
        assert run(root / "bin/first").split() == ["1"]
        make(root, "-q")

        wait_for_tick(root)
        run("touch", root / "include/part3.h")
        assert compiled(make(root)) == {"src/part3.c", "src/part4.c"}
        make(root, "-q")

        wait_for_tick(root)
        header = root / "include/part0.h"
        header.write_text(header.read_text().replace("PART0 1", "PART0 1001"))
        assert compiled(make(root)) == {"src/part0.c", "src/part1.c", "main/first.c"}
        assert run(root / "bin/total").split() == [str(1000 + sum(range(1, MODULES + 1)))]


def test_still_up_to_date_after_a_restart(place: Place) -> None:
    """Nothing is built again because the server is a new process, or because its source is looked at directly."""
    with place.pressure():
        write_project(place.path)
        make(place.path)
    place.forget()
    make(place.path, "-q")
    place.tree.restart()
    make(place.path, "-q")
    assert compiled(make(place.path)) == set()
    make(place.source, "-q")
    with place.pressure():
        make(place.path, "clean")
        assert sorted(p.name for p in place.path.iterdir()) == ["Makefile", "include", "main", "src"]
