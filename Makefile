# Thin wrappers; the scripts say more with --help.
.PHONY: install test lint quickstart bench
VENV ?= $(or $(HANDLEFS_VENV),.venv)

install quickstart test:
	scripts/$@

bench: # make bench BENCH='--scale quick'
	scripts/bench $(BENCH)

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict
