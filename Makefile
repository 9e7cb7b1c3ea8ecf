PYTHON ?= python

.PHONY: check fix bench slow

check:
	ruff format --check .
	ruff check .
	mypy
	$(PYTHON) -m benchmarks.readme --check
	pytest -q

fix:
	ruff format .
	ruff check --fix .
	$(PYTHON) -m benchmarks.readme

bench:
	$(PYTHON) -m benchmarks.run

slow:
	pytest -q -m slow
