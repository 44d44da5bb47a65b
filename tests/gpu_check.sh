#!/usr/bin/env bash
# One machine with an NVIDIA GPU, without any network: builds with the Python at hand (torch with
# CUDA, pybind11, scikit-build-core, nlohmann-json, cmake, ninja, nvcc), runs every GPU test (a skip
# fails), then the GPU benchmark, also where a test has failed. Under eight minutes: the benchmark is
# stopped then, and what it has measured is recorded.
#   PYTHON   the interpreter (python3)
#   RESULTS  the JSON file of the benchmark (benchmarks/results/DATE-MACHINE.json)
#   ROUNDS   of the benchmark (3)
#   WHEELS   a folder of wheels, for what the interpreter lacks: nlohmann-json, and the peers of
#            benchmarks/environments, which get environments of their own
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-}
site=build/gpu-site
needs=build/gpu-needs
export HF_HUB_OFFLINE=1

"$python" - <<'EOF'
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__)
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here: `make gpu-check` needs one")
print(torch.cuda.get_device_name(), "driver CUDA", torch.version.cuda)
EOF

install() {
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile "$@"
}

rm -rf "$site" "$needs"
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("nlohmann_json") is None)'
then
  [ -n "$wheels" ] || { echo "no nlohmann-json: name a folder with its wheel in WHEELS" >&2; exit 1; }
  install --find-links "$wheels" --target "$needs" nlohmann-json
fi
export PYTHONPATH="$PWD/$site:$PWD/$needs${PYTHONPATH:+:$PYTHONPATH}"
install --no-build-isolation --target "$site" \
  -C build-dir=build/gpu -C cmake.define.WEIGHTLIFT_CUDA=ON .
"$python" -m weightlift doctor

# As `make bench-env` does: each sees the interpreter's packages behind its own. torch is there.
for peer in ${wheels:+benchmarks/environments/*.txt}; do
  name=$(basename "$peer" .txt)
  rm -rf ".bench/$name"
  "$python" -m venv --without-pip ".bench/$name"
  own=$(".bench/$name/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    > "$own/main.pth"
  grep -v '^#\|^torch=' "$peer" > "build/$name.txt"
  install --find-links "$wheels" --target "$own" -r "build/$name.txt" ||
    echo "$name cannot be installed from $wheels: the benchmark will say so"
done

# Warnings and plug-ins are those of whatever else is installed there.
failed=0
WEIGHTLIFT_REQUIRE_GPU=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
  "$python" -m pytest -p no:cacheprovider -W default -m gpu \
  tests/python/gpu ||
  failed=$?

# Those whose files are made and loaded within the time there is.
timeout $((470 - SECONDS)) "$python" benchmarks/run.py --device cuda --repeat "${ROUNDS:-3}" \
  cuda-same cuda-cast cuda-small-100k ${RESULTS:+--out "$RESULTS"} || {
  [ $? = 124 ] || exit 1
  echo "the benchmark was stopped after eight minutes in all; the JSON has what was measured"
}
exit "$failed"
