#!/usr/bin/env bash
# Tests the project on the newest megatron-core and torch, and what they and the oldest supported ones have in common.
#
#   bash tests/run_newest.sh [PYTEST_ARGUMENTS]   e.g. bash tests/run_newest.sh tests/distributed/test_versions.py
#
# Makes .venv-newest: Python 3.12 or 3.13, the newest megatron-core, the newest torch. That is PyPI's build for CUDA, some
# gigabytes, which runs on a CPU too; TORCH_SPEC names another. Beside it .venv-test of tests/run.sh, with Python 3.11 or
# 3.10: losses are compared with its, and each reads the other's checkpoints and guidance caches.
# Without arguments: unit tests, the equivalence matrix, LoRA, interleaved stages, context parallelism, resuming, conversion,
# guidance caches, and the exchange between versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() { # MINOR...: the first of these versions of Python, by name or among pyenv's
  local minor candidate
  for minor in "$@"; do
    for candidate in "python$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$minor".*/bin/python; do
      if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        "$candidate" -c 'import sys; print(sys.executable)'
        return
      fi
    done
  done
  return 1
}

newest=$(find_python 3.12 3.13) || { echo "run_newest.sh: no Python 3.12 or 3.13 found: install one" >&2; exit 1; }
PYTHON=$newest TORCH_SPEC=${TORCH_SPEC:-torch} bash launch/setup_env.sh .venv-newest test
if oldest=$(find_python 3.11 3.10); then
  PYTHON=$oldest TORCH_SPEC= bash launch/setup_env.sh .venv-test dev
  export TGDPO_OTHER_PYTHON=$PWD/.venv-test/bin/python
else
  echo "run_newest.sh: no Python 3.11 or 3.10 found: nothing is compared with the oldest versions" >&2
fi

versions='import sys; from importlib.metadata import version as v
print("Python %d.%d," % sys.version_info[:2], "megatron-core", v("megatron-core") + ", torch", v("torch"))'
for python in .venv-newest/bin/python ${TGDPO_OTHER_PYTHON:-}; do "$python" -c "$versions"; done
if [ $# -eq 0 ]; then
  set -- tests/distributed/test_{equivalence,versions,interleaved,resume,checkpoint_shards,conversion,guidance,lora}.py tests/unit
fi
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 exec .venv-newest/bin/python -m pytest \
  --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
