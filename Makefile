# Everything runs in .venv, which the first target to need it builds.
PYTHON ?= python3
RUN := .venv/bin/python
INSTALLED := .venv/installed

.PHONY: search test fuzz lint docs benchmark clean

# Searches the formats of a ResNet-8 on scikit-learn's digits, beside uniform baselines.
search: $(INSTALLED)
	$(RUN) -m experiments.sweep --config=configs/digits_resnet8.py --workdir=runs/digits_resnet8

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses auto --dist loadfile

# The random operations of the tests, ten times as many.
fuzz: $(INSTALLED)
	AQT_SEARCH_FUZZ_CASES=20000 $(RUN) -m pytest tests/test_fuzz.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The site, into build/docs: runs the tutorials, checks every link, and stops at a warning.
docs: .venv/installed_docs
	$(RUN) -m sphinx --quiet --fresh-env --nitpicky --fail-on-warning docs build/docs
	@echo "Open build/docs/index.html"

benchmark: $(INSTALLED)
	$(RUN) -m benchmarks.search_step
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev,bench]
	$(RUN) -m benchmarks.quantized_ops

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aqt_search needs Python 3.11 or newer; run make with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev]
	@touch $(INSTALLED)

.venv/installed_docs: $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .[dev,docs]
	@touch $@

clean:
	rm -rf .venv runs build
