# Thin wrappers; the scripts say more with --help.
.PHONY: install test lint quickstart bench torture
VENV ?= $(or $(HANDLEFS_VENV),.venv)

install quickstart test:
	scripts/$@

bench: # make bench BENCH='--scale quick'
	scripts/bench $(BENCH)

torture: # make torture TORTURE='--minutes 10 --fs ext4 --seed 1'
	scripts/torture $(TORTURE)

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict
