# Everything a newcomer or CI runs. Each target does its own set-up.
#
#   make serve   start the service on this machine    make test    check and run all tests
#   make check   format, lint, types; edits nothing   make fix     format and repair what can be
#   make bench   measure                              make proto   regenerate the *_pb2.py

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

.PHONY: setup serve test check fix bench proto clean

setup: $(READY)

serve: $(READY)
	@exec $(BIN)/rayseek serve $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

check: $(READY_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/rayseek bench $(ARGS)

proto: $(READY_DEV)
	$(BIN)/python -m grpc_tools.protoc -Icluster --python_out=cluster --pyi_out=cluster tokens.proto
	$(BIN)/python -m grpc_tools.protoc -Iserve_app --python_out=serve_app --pyi_out=serve_app chat.proto

clean:
	rm -rf $(VENV) typings *.egg-info build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A link instead of a package folder: the type checker finds `rayseek.kernels` in `kernels/`.
typings/rayseek:
	mkdir -p typings && ln -sfn .. $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Rayseek needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(BIN)/python typings/rayseek
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(READY_DEV): pyproject.toml | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
