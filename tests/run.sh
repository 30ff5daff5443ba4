#!/usr/bin/env bash
# Makes the tests' own environment and runs them: unit, and distributed on 1, 2 and 4 gloo processes.
#
#   bash tests/run.sh [--full] [PYTEST_ARGUMENTS]   e.g. bash tests/run.sh tests/unit -k loss
#
# With --full the layouts that are otherwise tested by example are all run, and ten steps of each for five
# (tests/distributed/test_equivalence.py, test_lora.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --full ]; then
  export TGDPO_TESTS_FULL=1
  shift
fi
bash launch/setup_env.sh .venv-test dev
python=.venv-test/bin/python
if [ $# -eq 0 ]; then
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
fi
# Two processes keep two cores busy while tests of several ranks wait; each file, and its fixtures, stays with one. In
# the files' own order the long ones come first.
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 exec "$python" -m pytest \
  --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
