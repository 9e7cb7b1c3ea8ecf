PYTHON ?= python

.PHONY: check fix bench slow sanitize cross

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

# The engine compiled with sanitizers, its tests, and the engine as it was.
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize:
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" pip install -q --no-deps -e .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		pytest -q -p no:cacheprovider tests/test_native_rows.py tests/test_native_attention.py tests/test_native_experts.py \
		tests/test_native_engine.py; status=$$?; pip install -q --no-deps -e . && exit $$status

cross:
	pytest -q -m slow tests/test_native_cross.py
