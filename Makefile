# Everything runs in VENV, which the first target to need it builds.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

.PHONY: search test test-fast fuzz lint docs benchmark clean

# Searches the formats of a MobileNetV2 on scikit-learn's digits, beside uniform ones: two runs at a time.
search: $(INSTALLED)
	XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=2" $(RUN) -m experiments.sweep \
		--config=configs/digits_mobilenet_v2.py --workdir=runs/digits_mobilenet_v2

# A worker that crashes ends the run: xdist waits forever for the tests of a file begun by another.
PYTEST := -m pytest --numprocesses auto --dist loadfile --max-worker-restart 0

test: $(INSTALLED)
	$(RUN) $(PYTEST) --no-loadscope-reorder

# What the library promises, without the jobs: for a second Python and jax.
FAST := $(addprefix tests/test_,$(addsuffix .py,formats fake_quant granularity calibration quantizer \
	qtensor gradient_rules learned_scales ops depthwise sites control_flow rules transform freeze \
	stateful assignment_file cost roofline space policy critic answer searchers own_loop import \
	residuals stored_order tiled_weights gpu_programs matrices measured_facts measured_executions))

test-fast: $(INSTALLED)
	$(RUN) $(PYTEST) $(FAST)

# The random operations of the tests, ten times as many.
fuzz: $(INSTALLED)
	AQT_SEARCH_FUZZ_CASES=20000 $(RUN) -m pytest tests/test_fuzz.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(RUN)

# The site, into build/docs: runs the tutorials, checks every link, and stops at a warning.
docs: $(VENV)/installed_docs
	$(RUN) -m sphinx --quiet --fresh-env --nitpicky --fail-on-warning docs build/docs
	@echo "Open build/docs/index.html"

benchmark: $(INSTALLED)
	$(RUN) -m benchmarks.search_step
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev,bench]
	$(RUN) -m benchmarks.quantized_ops

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aqt_search needs Python 3.11 or newer; run make with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev]
	@touch $(INSTALLED)

$(VENV)/installed_docs: $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev,docs]
	@touch $@

clean:
	rm -rf .venv .venv-* runs build
