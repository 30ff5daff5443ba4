#!/usr/bin/env bash
# Makes an environment with Transformer Engine's Python in it and runs the tests that emulate its kernels on the CPU.
#
#   bash tests/emulation/run.sh [PYTEST_ARGUMENTS]             e.g. bash tests/emulation/run.sh -k delayed
#   TE_VERSION=2.9.0 bash tests/emulation/run.sh               another version, in an environment of its own
#
# Transformer Engine's Python is 1 MB and needs no compiler and no GPU: its compiled parts are left out, and their
# arithmetic is that of tests/emulation/kernels.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=${TE_VERSION:-2.20.2}
environment=.venv-emulation-$version
bash launch/setup_env.sh "$environment" test
python=$environment/bin/python
pip=("$python" -m pip --disable-pip-version-check)
if ! "${pip[@]}" show --quiet transformer_engine onnxscript einops triton 2>/dev/null; then
  # What its PyTorch part imports, then itself alone: its extras are the compiled parts. CPU builds of torch lack triton.
  "${pip[@]}" install --quiet einops onnx onnxscript pydantic triton
  "${pip[@]}" install --quiet --no-deps "transformer_engine==$version"
fi
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 exec "$python" -m pytest tests/emulation "$@"
