#!/usr/bin/env bash
# Submits the stages of `tgdpo pipeline` to Slurm as a chain of jobs, and prints their ids: the guide, the guidance cache
# (if the config has one), the training, the export to HF and the evaluation, all from one config.
#
#   bash launch/pipeline.sh CONFIG.yaml [section.key=value ...]
#
# `tgdpo pipeline --help` says what the stages are. Those that are complete are skipped, so after a failure, start the
# same command again (when no job of it is left). Options for sbatch, e.g. a partition or --nodes:
#
#   TGDPO_TRAIN_OPTIONS    for the trainings of guide and policy
#   TGDPO_STAGE_OPTIONS    for all other jobs; each is one task, and the guidance cache takes all GPUs that it sees
set -euo pipefail

fail() { echo "pipeline.sh: $*" >&2; exit 1; }

[ $# -ge 1 ] || fail "usage: bash launch/pipeline.sh CONFIG.yaml [section.key=value ...]"
[ $# -eq 1 ] || [[ $2 == *=* ]] || fail "$2: not section.key=value; where the runs go, output_dir in the config says"
TGDPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TGDPO_ROOT
# shellcheck source=launch/env.sh
source "$TGDPO_ROOT/launch/env.sh"

# A line for each stage, its name and "complete" or "to do", after one with the output directory.
list=$("${prefix[@]}" "$python" -m tgdpo pipeline "$@" --list) || exit 1
out=$(sed -n 's/^output_dir\t//p' <<<"$list")
[ -n "$out" ] || fail "tgdpo pipeline --list names no output directory"
mkdir -p "$out"
read -ra stage_options <<<"${TGDPO_STAGE_OPTIONS:-}"
read -ra train_options <<<"${TGDPO_TRAIN_OPTIONS:-}"

after=
while IFS=$'\t' read -r name state; do
  case $name in
    output_dir) continue ;;
    guide) job=("${train_options[@]}" "$TGDPO_ROOT/launch/train.sbatch" --guide "$@") ;;
    train) job=("${train_options[@]}" "$TGDPO_ROOT/launch/train.sbatch" "$@") ;;
    *) job=("${stage_options[@]}" "$TGDPO_ROOT/launch/stage.sbatch" PYTHON -m tgdpo pipeline "$@" --only "$name") ;;
  esac
  if [ "$state" = complete ]; then
    echo "$name: complete, skipped"
    continue
  fi
  id=$(sbatch --parsable --job-name="tgdpo-$name" --output="$out/slurm-%j-${name//\//-}.out" --kill-on-invalid-dep=yes \
    ${after:+--dependency="afterok:$after"} "${job[@]}" </dev/null)
  id=${id%%;*}
  echo "$name: job $id${after:+ after $after}"
  after=$id
done <<<"$list"
echo "aligned model (HF): in $out/hf, a directory for each step that was exported"
