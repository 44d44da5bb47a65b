#!/usr/bin/env bash
# The wheel and the core on every Python at hand: a clean environment each, no compiler flags of the
# development build, torch only where the pinned one can be had.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for version in 3.10 3.11 3.12 3.13 3.14; do
  python=
  # A pyenv shim is on the path for every version and runs only the chosen ones.
  for candidate in "$(command -v "python$version" || true)" \
                   "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if [ -z "$python" ] && [ -x "$candidate" ] && "$candidate" -c "" 2>/dev/null; then
      python=$candidate
    fi
  done
  if [ -z "$python" ]; then
    echo "python $version: not on this machine"
    continue
  fi
  "$python" -m venv "$work/$version"
  bin="$work/$version/bin"
  "$bin/python" -m pip -q --disable-pip-version-check install .
  if "$bin/python" tests/python/helpers/core_check.py; then
    echo "python $version: built, core works"
  else
    echo "python $version: FAILED"
    failed=1
  fi
done
exit $failed
