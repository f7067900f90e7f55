# make demo [DATA=.../DatasetXXX_Name]   from raw images to contours, in an environment of its own
# make test                              units, some cells of each trainer, copy-paste through nnU-Net's commands and tools
# make test-matrix                       all tests: every cell of the trainer matrix through nnU-Net's commands, and what else takes long
# make lint
PYTHON ?= python3
SOURCES := pyproject.toml $(wildcard packaging/*) $(shell find nnunetv2_selfreg trainers -name '*.py')

.PHONY: demo test test-matrix lint clean

demo: .venv-demo/installed
	.venv-demo/bin/python scripts/demo.py $(if $(DATA),--data "$(DATA)")

# Three workers fill two cores: they often wait for processes that start or end.
test: .venv-test/installed
	.venv-test/bin/python -m pytest -n 3 --dist loadscope

test-matrix: .venv-test/installed
	.venv-test/bin/python -m pytest -n 3 --dist loadscope --commands

lint: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

# The demo installs the package as a user does; the tests use the checkout.
.venv-demo/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet .
	touch $@

.venv-test/installed: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv-demo .venv-test demo-run build dist .pytest_cache .hypothesis .ruff_cache
