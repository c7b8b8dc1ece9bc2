# The only door: every task that a person does has a target. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# These come from the command line alone: some shells export a NAME or a VERSION of their own.
$(foreach variable,NAME VERSION REVISION PIPELINE MODEL_ID FROM CONFIG FORMAT DTYPE SIGN KEY ARGS PROMPT \
	FORCE SMOKE SBOM TO RUN_DIR STORE VENV DRAIN_S DEMO_PICTURE GATEWAY_DIR GATEWAY_PORT GATEWAY_ADDRESS \
	GPUS INSTANCES FOREGROUND HAPROXY HAPROXY_ADDRESS HAPROXY_PORT HAPROXY_CERT HAPROXY_METRICS,$(if $(filter environment,$(origin $(variable))),$(eval undefine $(variable))))

# The recipes put these between double quotes, where the shell would read such letters itself.
unquotable := " ` \ $$
$(foreach variable,NAME VERSION REVISION PIPELINE MODEL_ID FROM CONFIG FORMAT DTYPE SIGN KEY TO RUN_DIR STORE \
	DEMO_PICTURE GATEWAY_DIR GPUS HAPROXY_CERT,\
	$(foreach letter,$(unquotable),$(if $(findstring $(letter),$(value $(variable))),\
	$(error $(variable) may not have any of $(unquotable) in it; rename it or move it))))

# A prompt is any text, so it goes by the environment; of ARGS the shell is asked what it thinks.
export MAKE_PROMPT := $(value PROMPT)
export MAKE_ARGS   := $(value ARGS)
CHECK_ARGS = bash -nc "true $$MAKE_ARGS" 2>/dev/null || { \
	echo "make: ARGS cannot be read, is a quotation in it not closed? ARGS=$$MAKE_ARGS" >&2; exit 2; }

VENV      ?= .venv
RUN_DIR   ?= .run
GATEWAY_DIR ?= $(RUN_DIR)-gateway
STORE     ?= model-store
PORT      ?= 8080
GRPC_PORT ?= 7070
ADDRESS   ?= 127.0.0.1
AUTH      ?= off
DRAIN_S   ?= 60
PIP_ARGS  ?=
DEMO_PICTURE ?= demo.png
# Test files that run at the same time, each process with models and servers of its own.
JOBS      ?= 2
PARALLEL   = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The first Python that the pinned packages are made for makes the virtual environment; PYTHON=… chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CLI       := $(PY) -m diffusers_torchserve
# For targets that only look: they install nothing.
IS_INSTALLED = [ -x $(PY) ] || { echo "Nothing is installed yet: make demo" >&2; exit 1; }

# The archive to look at, which is the one that `make serve` would take.
CHOSEN = --store "$(STORE)" $(if $(NAME),--name "$(NAME)")

# The archive of the embedded pipeline; .embedded marks that it is ours.
DEFAULT_ARCHIVE := $(STORE)/stable_diffusion.mar
EMBEDDED        := $(STORE)/.embedded

START = --run-dir "$(RUN_DIR)" --store "$(STORE)" --port $(PORT) --grpc-port $(GRPC_PORT) \
	--address $(ADDRESS) --auth $(AUTH)
# Several instances, one a GPU or so many on the CPU.
FLEET = $(if $(GPUS),--gpus "$(GPUS)") $(if $(INSTANCES),--instances $(INSTANCES))

.PHONY: help demo setup archive inspect verify push pull serve up down key restart stop status logs test test-fast chaos gpu-check lint format bench clean

help: ## List the targets
	@echo "make demo first; then your own curl."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS='|' read -r target text; do printf '%-17s %s\n' "$$target" "$$text"; done

demo: $(INSTALLED) ## Install, build, start TorchServe, draw demo.png; the server keeps running [PROMPT=]
	@$(CLI) demo $(START) --out "$(DEMO_PICTURE)" $(if $(value PROMPT),--prompt "$$MAKE_PROMPT")

setup: $(INSTALLED) ## Make .venv with the pinned packages (PIP_ARGS=… are passed to pip)

$(INSTALLED): constraints.txt pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.11, 3.12 or 3.13 is needed and none was found;" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (once; a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' \
		> $(VENV)/requirements.txt
	@$(PY) -m pip install --disable-pip-version-check $$([ -t 2 ] || echo --quiet) $(PIP_ARGS) \
		-c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

archive: $(INSTALLED) ## Pack a pipeline: [PIPELINE=path | MODEL_ID=org/name REVISION= | FROM=archive] [NAME= VERSION= CONFIG= DTYPE= FORMAT=dir SIGN=key SMOKE=1 ARGS= FORCE=1]
	@$(CHECK_ARGS)
	@$(CLI) pack --out "$(STORE)" $(if $(NAME),--name "$(NAME)") \
		$(if $(VERSION),--version "$(VERSION)") $(if $(FROM),--from "$(FROM)") \
		$(if $(MODEL_ID),--model-id "$(MODEL_ID)") $(if $(REVISION),--revision "$(REVISION)") \
		$(if $(PIPELINE),--pipeline "$(PIPELINE)") \
		$(if $(CONFIG),--config "$(CONFIG)") $(if $(DTYPE),--dtype "$(DTYPE)") \
		$(if $(FORMAT),--format "$(FORMAT)") $(if $(SIGN),--sign "$(SIGN)") \
		$(if $(SMOKE),--smoke) $(if $(FORCE),--force) $(ARGS)

inspect: $(INSTALLED) ## Show what an archive holds [NAME= SBOM=1]
	@$(CLI) inspect $(CHOSEN) $(if $(SBOM),--sbom)

verify: $(INSTALLED) ## Check an archive without serving it [NAME= KEY=public-key SMOKE=1]
	@$(CLI) verify $(if $(KEY),--key "$(KEY)") $(if $(SMOKE),--smoke) $(CHOSEN)

push: $(INSTALLED) ## Store an archive in an OCI registry: TO=registry/name:tag [NAME=]
	@$(CHECK_ARGS)
	@$(CLI) push $(CHOSEN) --to "$(TO)" $(ARGS)

pull: $(INSTALLED) ## Fetch an archive from one: FROM=registry/name@sha256:… [NAME= FORCE=1]
	@$(CHECK_ARGS)
	@$(CLI) pull $(CHOSEN) --from "$(FROM)" $(if $(FORCE),--force) $(ARGS)

serve: $(INSTALLED) ## Serve the archive in model-store/ [NAME= PORT= GRPC_PORT= AUTH=on ADDRESS=]; supervised: [GPUS=all|0,1 INSTANCES=2 FOREGROUND=1]
	@$(if $(FOREGROUND),exec) $(CLI) serve $(START) $(if $(NAME),--name "$(NAME)") $(FLEET) \
		--drain-s $(DRAIN_S) $(if $(FOREGROUND),--foreground)

up: $(INSTALLED) ## Serve with the gateway in front: http://127.0.0.1:8000 [GATEWAY_PORT= GATEWAY_ADDRESS= NAME= GPUS= INSTANCES= HAPROXY=1 …]
	@$(CLI) up $(START) $(if $(NAME),--name "$(NAME)") $(FLEET) --gateway-dir "$(GATEWAY_DIR)" \
		$(if $(GATEWAY_PORT),--gateway-port $(GATEWAY_PORT)) $(if $(GATEWAY_ADDRESS),--gateway-address $(GATEWAY_ADDRESS)) \
		$(if $(HAPROXY),--haproxy $(if $(HAPROXY_ADDRESS),--haproxy-address $(HAPROXY_ADDRESS)) \
		$(if $(HAPROXY_PORT),--haproxy-port $(HAPROXY_PORT)) \
		$(if $(HAPROXY_CERT),--haproxy-cert "$(HAPROXY_CERT)") \
		$(if $(HAPROXY_METRICS),--haproxy-metrics $(HAPROXY_METRICS)))

down: stop ## Stop both; the same as make stop

key: $(INSTALLED) ## Make a key for the gateway, shown this once: NAME=… [ARGS='--max-steps 50 …']
	@$(CHECK_ARGS)
	@$(PY) -m gateway.keys --name "$(NAME)" $(ARGS)

restart: ## Restart it with the archive as it is now; several instances one after another [DRAIN_S=60]
	@$(IS_INSTALLED)
	@$(CLI) restart --run-dir "$(RUN_DIR)" --drain-s $(DRAIN_S)

stop: ## Stop the server once its requests are finished; those that take longer get 503 [DRAIN_S=60]
	@[ ! -x $(PY) ] || $(CLI) stop --run-dir "$(RUN_DIR)" --drain-s $(DRAIN_S) \
		--gateway-dir "$(GATEWAY_DIR)"

status: ## Say what is served and whether it is ready
	@$(IS_INSTALLED)
	@$(CLI) status --run-dir "$(RUN_DIR)" --gateway-dir "$(GATEWAY_DIR)"

logs: ## Follow the server's log
	@$(IS_INSTALLED)
	@$(CLI) logs --follow --run-dir "$(RUN_DIR)"

test: $(INSTALLED) ## Everything that must pass, on the real TorchServe too [JOBS=2]
	@$(PY) -m pytest $(PARALLEL)

test-fast: $(INSTALLED) ## The tests that need no server and little time
	@$(PY) -m pytest $(PARALLEL) -m "not server and not slow"

chaos: $(INSTALLED) ## Break a site of its own while clients draw: an hour, or five minutes [ARGS=--short]
	@$(CHECK_ARGS)
	@$(PY) -m tests.chaos $(ARGS)

gpu-check: $(INSTALLED) ## On a machine with an NVIDIA GPU: its tests, a real server, short benchmarks; 8 minutes [ARGS=]
	@$(PY) -m scripts.gpu_check $(ARGS)

lint: $(INSTALLED) ## Report what ruff and mypy find; changes nothing
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

format: $(INSTALLED) ## Format the code and fix what can be fixed safely
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

bench: $(INSTALLED) ## Measure in-flight batching, load and the gateway anew: figures of the README (an hour)
	@$(PY) -m benchmarks.engine --rounds 3 --served
	@$(PY) -m benchmarks.load --speed max
	@$(PY) -m benchmarks.gateway

clean: stop ## Stop the server; remove its state, caches and the embedded archive (not .venv, your archives, the jobs nor keys)
	@for folder in "$(RUN_DIR)" "$(RUN_DIR)"/[0-9] "$(RUN_DIR)"/[0-9][0-9]; do \
		if grep -qsx '# This instance:' "$$folder/config.properties"; then \
			(cd "$$folder" && rm -rf tmp temp logs config.properties server.json sockets org); \
			[ "$$folder" = "$(RUN_DIR)" ] || rmdir -- "$$folder" 2>/dev/null || true; fi; done
	@rm -f -- "$(RUN_DIR)/fleet.json" "$(RUN_DIR)/fleet.log" "$(RUN_DIR)/fleet-stop.json" "$(RUN_DIR)/fleet-restart.json"
	@[ ! -d "$(RUN_DIR)" ] || rmdir -- "$(RUN_DIR)" 2>/dev/null || true
	@rm -f -- "$(DEMO_PICTURE)"
	@if grep -qsE ' gateway listens at http|^gateway: error: ' "$(GATEWAY_DIR)/gateway.log"; then \
		cd "$(GATEWAY_DIR)" && rm -rf pictures gateway.log gateway.log.1 gateway.json; fi
	@[ ! -d "$(GATEWAY_DIR)" ] || rmdir -- "$(GATEWAY_DIR)" 2>/dev/null || true
	@cd "$(RUN_DIR)-haproxy" 2>/dev/null && rm -f haproxy.log haproxy.json instances.cfg \
		certificate.pem admin.sock || true
	@[ ! -d "$(RUN_DIR)-haproxy" ] || rmdir -- "$(RUN_DIR)-haproxy" 2>/dev/null || true
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@[ ! -e "$(EMBEDDED)" ] || rm -f -- "$(EMBEDDED)" "$(DEFAULT_ARCHIVE)"
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
