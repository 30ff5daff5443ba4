#!/usr/bin/env bash
# Makes the tests' own environment and runs them: unit, and distributed on 1, 2 and 4 gloo processes.
#
#   bash tests/run.sh [PYTEST_ARGUMENTS]            e.g. bash tests/run.sh tests/unit -k loss
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh .venv-test dev
python=.venv-test/bin/python
if [ $# -eq 0 ]; then
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
fi
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false exec "$python" -m pytest "$@"
