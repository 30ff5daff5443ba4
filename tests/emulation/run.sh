#!/usr/bin/env bash
# Makes an environment with Transformer Engine's Python in it and runs the tests that emulate its kernels on the CPU.
#
#   bash tests/emulation/run.sh [PYTEST_ARGUMENTS]   e.g. bash tests/emulation/run.sh -k delayed
#
# Transformer Engine's Python is 1 MB and needs no compiler and no GPU: its compiled parts are left out, and their
# arithmetic is that of tests/emulation/kernels.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash launch/setup_env.sh .venv-emulation test
python=.venv-emulation/bin/python
pip=("$python" -m pip --disable-pip-version-check install --quiet)
if ! "$python" -m pip --disable-pip-version-check show --quiet transformer_engine onnxscript einops triton 2>/dev/null; then
  # What its PyTorch part imports, then itself alone: its extras are the compiled parts. CPU builds of torch lack triton.
  "${pip[@]}" einops onnx onnxscript pydantic triton
  "${pip[@]}" --no-deps transformer_engine==2.11.0
fi
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 exec "$python" -m pytest tests/emulation "$@"
