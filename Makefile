# make demo and make test are all a fresh machine needs: python3 (>= 3.11), make and a package index.

PYTHON ?= python3
UV := $(shell command -v uv || echo .uv/bin/uv)
# Or the first run of everything would pay for it.
export UV_COMPILE_BYTECODE := 1
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: demo test lint bench bench-sweep clean

demo: .venv/.runtime
	.venv/bin/jaxcomm demo --out demo

test: .venv/.test
	.venv/bin/python -m pytest -q

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build
	$(UV) pip install -q --python .venv/bin/python --no-deps --target build/installed .
	.venv/bin/pyright --pythonpath .venv/bin/python build/installed/jaxcomm

# transformers' side needs torch, ours has an environment without it.
bench: .venv/.test .venv-runtime/.runtime
	.venv/bin/python benchmarks/generate.py --python .venv-runtime/bin/python

# About half an hour, most of it the other side's.
bench-sweep: .venv/.test
	.venv/bin/python benchmarks/sweep.py

.venv/.runtime: pyproject.toml | $(UV)
	test -x .venv/bin/python || $(UV) venv -q --python $(PYTHON) .venv
	$(UV) pip install -q --python .venv/bin/python -e .
	touch $@

.venv-runtime/.runtime: pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) .venv-runtime
	$(UV) pip install -q --python .venv-runtime/bin/python -e .
	touch $@

.venv/.test: .venv/.runtime
	$(UV) pip install -q --python .venv/bin/python -e ".[test]"
	touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install -q uv

clean:
	rm -rf .venv .venv-runtime .uv build demo
