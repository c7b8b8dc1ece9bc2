# The only door: every task that a person does has a target. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# These come from the command line alone: some shells export a NAME or a VERSION of their own.
$(foreach variable,NAME VERSION REVISION PIPELINE MODEL_ID CONFIG FORMAT DTYPE SIGN KEY ARGS PROMPT \
	FORCE SMOKE RUN_DIR STORE VENV DEMO_PICTURE,$(if $(filter environment,$(origin $(variable))),$(eval undefine $(variable))))

VENV      ?= .venv
RUN_DIR   ?= .run
STORE     ?= model-store
PORT      ?= 8080
GRPC_PORT ?= 7070
ADDRESS   ?= 127.0.0.1
AUTH      ?= off
VERSION   ?= 1.0
REVISION  ?= main
PIP_ARGS  ?=
DEMO_PICTURE ?= demo.png

# The first Python that is new enough makes the virtual environment; PYTHON=… chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SERVE     := $(PY) -m scripts.serve
# For targets that only look: they install nothing.
IS_INSTALLED = [ -x $(PY) ] || { echo "Nothing is installed yet: make demo" >&2; exit 1; }

# What an archive is called that has no NAME: as its pipeline.
ARCHIVE_NAME = $(or $(NAME),$(notdir $(patsubst %/,%,$(or $(PIPELINE),$(MODEL_ID)))),$(DEFAULT))
# The archive to look at, which is the one that `make serve` would take.
CHOSEN = --store "$(STORE)" $(if $(NAME),--name "$(NAME)")

# The embedded default, rebuilt when anything inside it changes; .embedded marks that it is ours.
DEFAULT         := stable_diffusion
DEFAULT_ARCHIVE := $(STORE)/$(DEFAULT).mar
EMBEDDED        := $(STORE)/.embedded
DEFAULT_SOURCES := $(shell find demo/pipeline -type f 2>/dev/null) config/model-config.yaml \
	$(shell find handler -name '*.py' 2>/dev/null)

START = $(SERVE) start --run-dir $(RUN_DIR) --store $(STORE) --port $(PORT) \
	--grpc-port $(GRPC_PORT) --address $(ADDRESS) --auth $(AUTH)

.PHONY: help demo setup archive inspect verify serve stop status logs test test-fast lint format bench clean

help: ## List the targets
	@echo "make demo first; then your own curl."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS='|' read -r target text; do printf '%-17s %s\n' "$$target" "$$text"; done

demo: $(INSTALLED) $(DEFAULT_ARCHIVE) ## Install, build, start TorchServe, draw demo.png; the server keeps running [PROMPT=]
	@$(START) --name $(DEFAULT) --brief
	@$(PY) -m scripts.demo --run-dir $(RUN_DIR) --out $(DEMO_PICTURE) $(if $(PROMPT),--prompt "$(PROMPT)")

setup: $(INSTALLED) ## Make .venv with the pinned packages (PIP_ARGS=… are passed to pip)

$(INSTALLED): constraints.txt pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.11 or later is needed and none was found;" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (once; a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' \
		> $(VENV)/requirements.txt
	@$(PY) -m pip install --disable-pip-version-check $$([ -t 2 ] || echo --quiet) $(PIP_ARGS) \
		-c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

archive: $(INSTALLED) ## Pack a pipeline: [PIPELINE=folder | MODEL_ID=org/name REVISION=] [NAME= VERSION= CONFIG= DTYPE= FORMAT=dir SIGN=key SMOKE=1 ARGS= FORCE=1]
ifneq ($(strip $(PIPELINE)$(MODEL_ID)$(NAME)$(filter-out 1.0,$(VERSION))$(CONFIG)$(DTYPE)$(FORMAT)$(SIGN)$(ARGS)),)
	@$(PY) -m scripts.build_archive --out "$(STORE)" --version "$(VERSION)" --name "$(ARCHIVE_NAME)" \
		$(if $(MODEL_ID),--model-id "$(MODEL_ID)" --revision "$(REVISION)") \
		$(if $(MODEL_ID),,--pipeline "$(or $(PIPELINE),demo/pipeline)") \
		$(if $(CONFIG),--config "$(CONFIG)") $(if $(DTYPE),--dtype "$(DTYPE)") \
		$(if $(FORMAT),--format "$(FORMAT)") $(if $(SIGN),--sign "$(SIGN)") \
		$(if $(SMOKE),--smoke) $(if $(FORCE),--force) $(ARGS)
	@$(if $(filter $(DEFAULT),$(ARCHIVE_NAME)),rm -f $(EMBEDDED))
else
	@$(if $(FORCE),rm -f $(DEFAULT_ARCHIVE))
	@$(MAKE) --no-print-directory $(DEFAULT_ARCHIVE)
endif

$(DEFAULT_ARCHIVE): $(DEFAULT_SOURCES) | $(INSTALLED)
	@[ ! -e $@ ] || [ -e $(EMBEDDED) ] || { echo "make: $@ is an archive of your own: serve it" \
		"with make serve, or replace it by the embedded one with make archive FORCE=1" >&2; exit 1; }
	@echo "Packing the embedded pipeline into $@ ..."
	@$(PY) -m scripts.build_archive --pipeline demo/pipeline --name $(DEFAULT) --version 1.0 \
		--smoke-prompt "a small yellow star on a blue background" --out $(STORE) --force
	@touch $@ $(EMBEDDED)

inspect: $(INSTALLED) ## Show what an archive holds [NAME=]
	@$(PY) -m scripts.inspect_archive $(CHOSEN)

verify: $(INSTALLED) ## Check an archive without serving it [NAME= KEY=public-key SMOKE=1]
	@$(PY) -m scripts.verify_archive $(if $(KEY),--key "$(KEY)") $(if $(SMOKE),--smoke) $(CHOSEN)

serve: $(INSTALLED) ## Serve the archive in model-store/ [NAME= PORT= GRPC_PORT= AUTH=on ADDRESS=]
	@$(START) $(if $(NAME),--name "$(NAME)")

stop: ## Stop the server
	@[ ! -x $(PY) ] || $(SERVE) stop --run-dir $(RUN_DIR)

status: ## Say what is served and whether it is ready
	@$(IS_INSTALLED)
	@$(SERVE) status --run-dir $(RUN_DIR)

logs: ## Follow the server's log
	@$(IS_INSTALLED)
	@$(SERVE) logs --follow --run-dir $(RUN_DIR)

test: $(INSTALLED) ## Everything that must pass, on the real TorchServe too
	@$(PY) -m pytest

test-fast: $(INSTALLED) ## The tests that need no server and little time
	@$(PY) -m pytest -m "not server and not slow"

lint: $(INSTALLED) ## Report what ruff and mypy find; changes nothing
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

format: $(INSTALLED) ## Format the code and fix what can be fixed safely
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

bench: $(INSTALLED) ## Measure the README's figures: one UNet, then servers under load (an hour)
	@$(PY) -m benchmarks.engine --rounds 3 --served
	@$(PY) -m benchmarks.load --speed max

clean: stop ## Stop the server; remove its state, caches and the embedded archive (not .venv, nor your archives)
	@if grep -qs '^# This instance:' "$(RUN_DIR)/config.properties"; then \
		cd "$(RUN_DIR)" && rm -rf tmp temp logs config.properties server.json; fi
	@[ ! -d "$(RUN_DIR)" ] || rmdir -- "$(RUN_DIR)" 2>/dev/null || true
	@rm -f -- "$(DEMO_PICTURE)"
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@[ ! -e $(EMBEDDED) ] || rm -f $(EMBEDDED) $(DEFAULT_ARCHIVE)
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
