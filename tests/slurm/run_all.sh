#!/usr/bin/env bash
# Runs the Slurm tests with the slow ones, which wait for real time limits: some 20 minutes.
#
#   bash tests/slurm/run_all.sh [PYTEST_ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
TGDPO_SLOW_TESTS=1 exec bash tests/run.sh tests/slurm "$@"
