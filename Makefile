# Each target makes .venv and installs what it needs; a second run starts at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's CPU wheel
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAGE ?= 1
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*)
TEST_CXX_FILES := $(wildcard tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.cu)

.PHONY: demo learn test gates sanitize check bench gpu format clean

$(VENV)/base: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=23"
	$(BIN)/python -m pip install -q "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# Installed again when the package or a kernel changes; warnings are errors here, not for users.
$(VENV)/installed: $(VENV)/base pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	IV2_WERROR=ON $(BIN)/python -m pip install -q -e ".[demo,test,check]" "$(TORCH)"
	touch $@

# What the demo alone needs, unless all is there: this machine's instruction set builds in half the time.
$(VENV)/quick: $(VENV)/base pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	IV2_ISAS=native IV2_CUDA=0 $(BIN)/python -m pip install -q -e ".[demo]" "$(TORCH)"
	touch $@

demo: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/quick)
	$(BIN)/iv2 demo

learn: $(VENV)/installed
	$(BIN)/iv2 learn --stage $(STAGE)

test: $(VENV)/installed
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest

# The least times of the kernels by datasheets, and build/gates.html; then the kernels compiled for each
# GPU, none needed, and held to the budgets in tests/gates.
gates: $(VENV)/installed
	$(BIN)/python -m tests.gates.report
	$(BIN)/python -m tests.gates
	$(BIN)/python -m tests.gates.space
	$(BIN)/python -m tests.gates.cuda_resources

bench: $(VENV)/installed
	$(BIN)/python -m bench

# All that needs a GPU, in 8 minutes: the tests, then the bench, to bench/results/<gpu>.csv.
gpu: $(VENV)/installed
	status=0; $(BIN)/python -m tests.gpu --minutes 4 || status=1; \
	$(BIN)/python -m bench --device cuda --dtypes bfloat16 --no-compile --seconds 0.5 --minutes 3 \
		|| status=1; exit $$status

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a build of their own.
SANITIZED := build/sanitized
sanitize: $(VENV)/installed
	$(BIN)/python -m pip install -q cmake ninja "pybind11>=3"
	mkdir -p $(SANITIZED) && cp -r iv2kernels $(SANITIZED)/ && rm -f $(SANITIZED)/iv2kernels/_C*.so
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED)/cmake -GNinja -DIV2_SANITIZE=ON \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED)/iv2kernels \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)/cmake
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) IV2_TEST_BUILD=$(SANITIZED) \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -o pythonpath="$(SANITIZED) . tests" tests/ops \
		-k "not compile and not at_a_real"

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) $(TEST_CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) $(TEST_CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info iv2kernels/_C*.so
