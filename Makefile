# Thin wrappers; the scripts say more with --help.
.PHONY: install test lint quickstart
VENV ?= $(or $(HANDLEFS_VENV),.venv)

install quickstart test:
	scripts/$@

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict
