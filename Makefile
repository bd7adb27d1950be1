# Thin wrappers; the scripts say more with --help.
.PHONY: install test lint quickstart bench torture pruning explore
VENV ?= $(or $(HANDLEFS_VENV),.venv)

install quickstart test:
	scripts/$@

bench: # make bench BENCH='--scale quick'
	scripts/bench $(BENCH)

torture: # make torture TORTURE='--minutes 10 --fs ext4 --seed 1'
	scripts/torture $(TORTURE)

pruning: # make pruning PRUNING='--files 100000 --minutes 10 --fs xfs'
	$(VENV)/bin/python -m tests.lookup_handle.pruning $(PRUNING)

explore: # other examples of hypothesis than the suite's, and new ones each time
	$(VENV)/bin/python -m pytest --hypothesis-profile=explore tests/unit tests/lookup_handle

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict
