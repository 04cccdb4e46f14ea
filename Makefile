# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
# How many tests run at once, a thread each.
JOBS ?= 2
BENCH_SECONDS ?= 200
NETWORK_SECONDS ?= 80
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt
INSTALLED_FROM := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: run test lint unit triton triton-interpreted triton-compiled triton-report cuda cuda-report bench gpu gpu-sanitize

# The main job: a trained denoiser, its table and pictures.
run: .venv/ready
	$(BIN)/python -m train.unfolded

test: lint unit triton cuda

lint: .venv/ready
	$(BIN)/ruff check .

unit: .venv/ready
	$(PYTEST) --dist loadfile tests --durations=15 --ignore=tests/triton --ignore=tests/cuda --ignore=tests/gpu

# The Triton kernels without a GPU: interpreted on CPU tensors, and beside that compiled for GPUs that are not there.
triton: .venv/ready
	@$(MAKE) --no-print-directory --output-sync -j2 triton-interpreted triton-compiled

triton-interpreted:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton -q --durations=10 --ignore=tests/triton/test_compiled.py

triton-compiled:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton/test_compiled.py -q

triton-report: .venv/ready
	$(BIN)/python -m flowkern.kernels.aot --write

# The CUDA kernels without a GPU: run on the CPU by an emulation, under sanitizers too, and what nvcc made of them.
cuda: .venv/ready
	$(PYTEST) --dist worksteal tests/cuda --durations=10

cuda-report: .venv/ready
	$(BIN)/python -m bench.cuda_resources --write

# Under 6 minutes on two cores; make bench FULL=1 takes everything. Installs two more libraries without what they depend
# on, as .venv/ready does.
bench: .venv/ready
	@$(PIP) --no-deps FrEIA memcnn
	$(BIN)/python -m pytest bench --benchmark-only $(if $(FULL),--full)
	$(BIN)/python -m bench.report

# On a machine with a GPU, with the Python that has its PyTorch (make gpu PYTHON=...): build, test, measure, in 10 minutes.
gpu:
	$(PYTHON) -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	$(PYTHON) -m flowkern
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/gpu -q --durations=5 $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")
	$(PYTHON) -m bench.gpu --seconds $(BENCH_SECONDS) $(if $(OUT),--out $(OUT))
	$(PYTHON) -m bench.gpu_network --seconds $(NETWORK_SECONDS) $(if $(OUT),--out $(OUT))
	$(PYTHON) -m bench.gpu_report $$(ls -t bench/results/gpu-*.json | head -1) $(if $(OUT),--folder $(OUT))

# The CUDA kernels under compute-sanitizer's memory and race checkers, after make gpu has built them.
gpu-sanitize:
	$(PYTHON) -m bench.cuda_sanitizer

# Other flow libraries that tests compare with, without their dependencies, which would replace the installed PyTorch.
.venv/ready: $(INSTALLED_FROM)
	@echo "Setting up .venv (the first time this downloads PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -e ".[train,test,bench]"
	@$(PIP) --no-deps normflows nflows umnn
	@touch $@
