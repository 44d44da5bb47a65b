#!/usr/bin/env bash
# vLLM on the CPU, in an environment of its own: each parameter of each rank by the stock loader and
# by ours; and SGLang's loader. `tests/serving/run.sh 1 2 4`: with so many ranks. A GB is downloaded the
# first time.
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
# Two real starts, whose tokens are the same.
for format in auto weightlift; do
  "$venv/bin/python" tests/serving/generate.py "$home/models/started" $format \
    >"$home/started.$format.log" 2>&1 || failed+=" started.$format"
  grep -h "^tokens \|weightlift read" "$home/started.$format.log" || true
done
cmp <(grep "^tokens" "$home/started.auto.log") <(grep "^tokens" "$home/started.weightlift.log") ||
  failed+=" tokens"
# SGLang's own loader and hooks.
if ! cmp -s tests/serving/sglang-requirements.txt "$home/sglang/requirements.txt"; then
  rm -rf "$home/sglang"
  "$venv/bin/python" -m pip -q --disable-pip-version-check install --no-deps \
    -r tests/serving/sglang-requirements.txt --target "$home/sglang"
  cp tests/serving/sglang-requirements.txt "$home/sglang/requirements.txt"
fi
for way in slices whole; do
  PYTHONPATH=$home/sglang "$venv/bin/python" tests/serving/sglang_loader.py $way "$home/models/sglang" \
    >"$home/sglang.$way.log" 2>&1 || failed+=" sglang.$way"
  grep -h "^sglang " "$home/sglang.$way.log" || tail -20 "$home/sglang.$way.log"
done
[ -z "$failed" ] || { echo "failed:$failed; see $home/*.log"; exit 1; }
