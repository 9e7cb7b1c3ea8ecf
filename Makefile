PYTHON ?= python

.PHONY: check fix bench slow

check:
	ruff format --check .
	ruff check .
	mypy
	$(PYTHON) -m benchmarks.readme --check
	pytest -q -n 2 --dist loadfile

fix:
	ruff format .
	ruff check --fix .
	$(PYTHON) -m benchmarks.readme

MODEL ?= edge/demo

bench:
	$(PYTHON) -m benchmarks.run $(MODEL)

slow:
	pytest -q -m slow
