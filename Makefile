# make train   install into .venv and train nam56r_tiny on real C++
# make test    install into .venv and run lint, format check, type check and tests
# make docs    write the generated pages and renew the outputs shown in the others
# make site    the documentation as a site, in build/site
#
# PYTHON picks the interpreter, RUN the folder of the run: `make train RUN=runs/mine` resumes
# that run, or starts it.

PYTHON ?= python3
RUN ?= runs/nam56r_tiny-$(shell date +%Y%m%d-%H%M%S)

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints-cpu.txt
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: train test lint docs site clean

train: $(VENV)/.installed
	$(BIN)/nemo llm pretrain --factory "nam56r_tiny(log_dir='$(RUN)')" --yes

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict megacpp_nemo/contract megacpp_nemo/planner megacpp_nemo/lowering megacpp_nemo/cli
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "Open build/site/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is written only after a complete install, so an interrupted one is done again.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "Installing megacpp-nemo and what it needs into $(VENV): a few minutes, once."
	$(INSTALL) --editable ".[triton]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable ".[triton,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
