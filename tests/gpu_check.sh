#!/usr/bin/env bash
# One machine with an NVIDIA GPU, without any network: builds with the Python at hand (torch with
# CUDA, pybind11, scikit-build-core, nlohmann-json, cmake, ninja, nvcc), runs every GPU test (a skip
# fails), then the GPU benchmark. Under eight minutes.
#   PYTHON   the interpreter (python3)
#   RESULTS  the JSON file of the benchmark (benchmarks/results/DATE-MACHINE.json)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=build/gpu-site

"$python" - <<'EOF'
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__)
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here: `make gpu-check` needs one")
print(torch.cuda.get_device_name(), "driver CUDA", torch.version.cuda)
EOF

rm -rf "$site"
"$python" -m pip install -q --no-index --no-build-isolation --no-deps --no-compile --target "$site" \
  -C build-dir=build/gpu -C cmake.define.WEIGHTLIFT_CUDA=ON .
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m weightlift doctor

WEIGHTLIFT_REQUIRE_GPU=1 "$python" -m pytest -p no:cacheprovider -m gpu tests/python/test_gpu.py tests/python/test_gpu_backends.py tests/python/test_gpu_transformers.py
# Those whose files are made and loaded within the time there is.
"$python" benchmarks/run.py --device cuda cuda-same cuda-cast cuda-small-100k ${RESULTS:+--out "$RESULTS"}
