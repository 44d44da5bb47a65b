#!/usr/bin/env bash
# The tests of what meets other libraries, with each version of these that tests/matrix/*.txt locks,
# or with those named: `tests/matrix/run.sh oldest`. What a lock does not name, torch and the
# development build among it, comes from the main environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- $(basename -s .txt tests/matrix/*.txt)
failed=
for name; do
  lock=tests/matrix/$name.txt
  venv=build/matrix/$name
  if ! cmp -s "$lock" "$venv/lock.txt"; then
    rm -rf "$venv"
    .venv/bin/python -m venv --without-pip "$venv"
    "$venv/bin/python" - <<'PYTHON'
import sysconfig
from pathlib import Path

packages = Path(sysconfig.get_path("purelib"))
main = Path(".venv", packages.relative_to(packages.parents[2])).resolve()
(packages / "main.pth").write_text(f"import site; site.addsitedir({str(main)!r})\n")
PYTHON
    # It says that others in the main environment want other versions.
    "$venv/bin/python" -m pip -q --disable-pip-version-check install -r "$lock" 2>"$venv/pip.log" ||
      { cat "$venv/pip.log"; exit 1; }
    cp "$lock" "$venv/lock.txt"
  fi
  tests=$(sed -n 's/^# tests: //p' "$lock")
  echo "== $name: $("$venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

names = ("transformers", "diffusers", "accelerate", "safetensors", "huggingface_hub")
print(", ".join(f"{name} {version(name)}" for name in names))
PYTHON
)"
  (cd tests/python && ls $tests) | sed 's|^|tests/python/|' |
    xargs "$venv/bin/python" -m pytest -m "not gpu and not deep" -p no:cacheprovider ||
    failed+=" $name"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
