#!/usr/bin/env bash
# Makes a virtual environment with this project installed in it, or finds it made already.
#
#   bash launch/setup_env.sh VENV_DIR [EXTRAS]      e.g. bash launch/setup_env.sh .venv test
#
# VENV_DIR is relative to the repository's root; EXTRAS is a comma-separated list from pyproject.toml. An environment is
# reused if it was finished for this pyproject.toml, these extras, this torch and this path, and made anew otherwise.
# TORCH_SPEC says which torch to install (default: torch==2.13.0 where no NVIDIA GPU is seen, torch>=2.6 where one is).
# PYTHON names the interpreter (default: the first of python3.12, 3.11, 3.10 and 3.13). Under Python 3.10 and 3.11 pip takes
# megatron-core 0.16, the last for them, and under a newer one the newest.
# With the extra gpu, Transformer Engine's PyTorch part is compiled for that torch: it needs nvcc and takes a while.
set -euo pipefail

fail() { echo "setup_env.sh: $*" >&2; exit 1; }

if [ $# -lt 1 ] || [ $# -gt 2 ]; then fail "usage: bash launch/setup_env.sh VENV_DIR [EXTRAS]"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1
extras=${2:-}

if [ -z "${TORCH_SPEC:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    TORCH_SPEC="torch>=2.6"
  else
    TORCH_SPEC="torch==2.13.0"
  fi
fi

# Two set-ups of one environment at a time would spoil it; the lock goes with this process. Not every system has flock.
exec 9<pyproject.toml
if command -v flock >/dev/null; then flock 9; fi

# A name on the PATH is not enough: version managers leave launchers for versions they do not run.
python=
candidates=(python3.12 python3.11 python3.10 python3.13 python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
    >/dev/null 2>&1; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] ||
  fail "${PYTHON:+PYTHON=$PYTHON: }no Python 3.10 to 3.13 with the venv module found: install one (Debian: python3.11-venv)"

# The path is in the key because the environment's scripts name it: one that was moved does not work.
key=$("$python" - "$PWD" "$venv" "$extras" "$TORCH_SPEC" <<'PYTHON'
import hashlib, pathlib, sys
parts = [pathlib.Path("pyproject.toml").read_text(encoding="utf-8"), sys.version, *sys.argv[1:]]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
)
stamp=$venv/.complete
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
  echo "environment $venv: complete, reused"
  exit 0
fi

begun=$venv/.begun
if [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
  # Never what somebody else made.
  [ -f "$stamp" ] || [ -f "$begun" ] ||
    fail "$venv exists and was not made by this script: move it away or name another directory"
  echo "environment $venv: unfinished or for another set-up, made anew"
  rm -rf "$venv"
fi
echo "environment $venv: $("$python" --version), $TORCH_SPEC, this project${extras:+ with [$extras]}; takes minutes"
mkdir -p "$venv"
touch "$begun"
"$python" -m venv "$venv"
# Errors are shown; warnings are of people's own pip settings.
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet)
# torch in a call of its own, so that the choice of build above is not reopened by what depends on it.
echo "installing $TORCH_SPEC"
"${pip[@]}" "$TORCH_SPEC"
plain=$(printf '%s' "$extras" | tr ',' '\n' | grep -vx gpu | paste -sd, || true)
echo "installing this project and what it needs"
"${pip[@]}" --editable ".${plain:+[$plain]}"

install_transformer_engine() {
  command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    fail "the extra gpu compiles Transformer Engine: install the CUDA toolkit of torch's version (nvcc), or set CUDA_HOME"
  # Its build needs this environment's torch, so pip must not make another environment for it, and must find there what
  # such an environment would get.
  "${pip[@]}" setuptools wheel pybind11 ninja packaging
  local requirement includes
  requirement=$("$venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import torch
from packaging.requirements import Requirement

if torch.version.cuda is None:
    sys.exit("setup_env.sh: the extra gpu needs a torch with CUDA: set TORCH_SPEC, this one is " + torch.__version__)
for text in importlib.metadata.requires("megatron-tgdpo") or []:
    found = Requirement(text)
    if found.name == "transformer-engine":
        # The libraries for torch's CUDA; without this extra they are those for CUDA 12.
        print(f"{found.name}[pytorch,core_cu{torch.version.cuda.partition('.')[0]}]{found.specifier}")
PYTHON
  ) || exit 1
  # Headers of cuDNN and NCCL, where they come with PyPI's torch and not with the toolkit.
  includes=$("$venv/bin/python" -c 'import glob, site; print(":".join(glob.glob(site.getsitepackages()[0] + "/nvidia/*/include")))')
  NVTE_FRAMEWORK=pytorch CPATH="$includes${CPATH:+:$CPATH}" "${pip[@]}" --no-build-isolation "$requirement"
  "$venv/bin/python" -c 'import transformer_engine.pytorch' ||
    fail "Transformer Engine is installed and cannot be imported, for the reason above"
}
case ",$extras," in *,gpu,*) install_transformer_engine ;; esac

printf '%s\n' "$key" >"$stamp.part"
mv "$stamp.part" "$stamp"
echo "environment $venv: complete"
