#!/usr/bin/env bash
# Submits the whole mission to Slurm as a chain of jobs, and prints their ids: HF model and preference pairs in, a DPO
# guide, a TGDPO policy trained with it, both exported to HF, and their metrics on the validation pairs.
#
#   bash launch/pipeline.sh CONFIG.yaml OUT_DIR [section.key=value ...]
#
# CONFIG is a TGDPO config whose model.policy is an HF directory and whose data.train and data.validation are files of
# pairs; model.guide and output_dir are set here. Stages whose output is complete in OUT_DIR are skipped, so after a
# failure, start the same command again (when no job of it is left). Options for sbatch, e.g. a partition or --nodes:
#
#   TGDPO_STAGE_OPTIONS    for all jobs but the two trainings
#   TGDPO_TRAIN_OPTIONS    for the two trainings
set -euo pipefail

fail() { echo "pipeline.sh: $*" >&2; exit 1; }

[ $# -ge 2 ] || fail "usage: bash launch/pipeline.sh CONFIG.yaml OUT_DIR [section.key=value ...]"
TGDPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TGDPO_ROOT
# shellcheck source=launch/env.sh
source "$TGDPO_ROOT/launch/env.sh"
config=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2

# What stages other than training take from the config, a word a line.
settings=$("${prefix[@]}" "$python" - "$config" model.guide="$out/dpo_hf" output_dir="$out/tgdpo" "$@" <<'PYTHON'
import sys

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.hub import hub_name, local_path

try:
    config = load_config(sys.argv[1], sys.argv[2:])
    for name, value in (("train", config.data.train), ("validation", config.data.validation)):
        if not isinstance(value, (str, type(None))):
            raise UserError(f"data.{name}: a pipeline preprocesses one path: a file, a directory, or a glob")
    if any(name and hub_name(name) for name in (config.model.policy, config.data.tokenizer)):
        from megatron_tgdpo.setup.hub_inputs import pin_here

        config = pin_here(config, weights=True)
except UserError as error:
    sys.exit(f"error: {error}")
data = config.data
policy = str(local_path(config.model.policy))
print(policy, data.train, data.validation or "", sep="\n")
options = {
    "--tokenizer": local_path(data.tokenizer) if data.tokenizer else policy,
    "--chat-template": data.chat_template,
    "--max-length": data.max_length,
    "--max-prompt-length": data.max_prompt_length,
    "--overlong-prompt": data.overlong_prompt,
}
for name, value in options.items():
    if value is not None:
        print(name, value, sep="\n")
PYTHON
) || exit 1
mapfile -t words <<<"$settings"
policy=${words[0]} train=${words[1]} validation=${words[2]}
[ -n "$validation" ] || fail "$config: data.validation is not set: name a file of pairs, the models are compared on it"
preprocess=(PYTHON -m tgdpo preprocess "${words[@]:3}")

read -ra stage_options <<<"${TGDPO_STAGE_OPTIONS:-}"
read -ra train_options <<<"${TGDPO_TRAIN_OPTIONS:-}"

submit() { # NAME COMPLETE_FILE AFTER SBATCH_ARGUMENTS...: sets job to the id, or to nothing where it is complete
  local name=$1 complete=$2 after=$3
  shift 3
  job=
  if [ -e "$complete" ]; then
    echo "$name: complete, skipped ($complete)"
    return
  fi
  job=$(sbatch --parsable --job-name="tgdpo-$name" --output="$out/slurm-%j-$name.out" --kill-on-invalid-dep=yes \
    ${after:+--dependency="afterok$after"} "$@")
  job=${job%%;*}
  echo "$name: job $job${after:+ after ${after#:}}"
}
stage() { # NAME COMPLETE_FILE AFTER COMMAND...
  submit "$1" "$2" "$3" "${stage_options[@]}" "$TGDPO_ROOT/launch/stage.sbatch" "${@:4}"
}
overrides=("$@")
training() { # NAME AFTER OVERRIDES...
  submit "$1" "$out/$1/DONE" "$2" "${train_options[@]}" "$TGDPO_ROOT/launch/train.sbatch" "$config" \
    "${overrides[@]}" output_dir="$out/$1" model.policy="$out/base" data.train="$out/data/train" \
    data.validation="$out/data/validation" "${@:3}"
}
then_() { echo "${1:+:$1}${2:+:$2}${3:+:$3}"; } # JOB_IDS...: as a dependency, without those that are complete

stage convert "$out/base/tgdpo.json" "" PYTHON -m tgdpo convert to-megatron --hf "$policy" --out "$out/base"
convert=$job
stage preprocess-train "$out/data/train.manifest.json" "" "${preprocess[@]}" --input "$train" --output "$out/data/train"
data=$job
stage preprocess-validation "$out/data/validation.manifest.json" "" "${preprocess[@]}" --input "$validation" \
  --output "$out/data/validation"
inputs=$(then_ "$convert" "$data" "$job")
training dpo "$inputs" loss.method=dpo model.guide=null
dpo=$job
stage export-dpo "$out/dpo_hf/config.json" "$(then_ "$dpo")" PYTHON -m tgdpo convert to-hf \
  --megatron "$out/dpo" --out "$out/dpo_hf"
training tgdpo "${inputs}$(then_ "$job")" model.guide="$out/dpo_hf"
tgdpo=$job
stage export-tgdpo "$out/tgdpo_hf/config.json" "$(then_ "$tgdpo")" PYTHON -m tgdpo convert to-hf \
  --megatron "$out/tgdpo" --out "$out/tgdpo_hf"
# Training has evaluated its final weights at its last step: these are the lines of the last steps, DPO first.
# shellcheck disable=SC2016 # for the shell in the job
stage evaluate "$out/validation.jsonl" "$(then_ "$dpo" "$tgdpo")" bash -c \
  'tail -qn 1 "$1/dpo/metrics.jsonl" "$1/tgdpo/metrics.jsonl" >"$1/validation.part" && mv "$1/validation.part" "$1/validation.jsonl"' \
  - "$out"
echo "metrics on the validation pairs: $out/validation.jsonl; aligned model (HF): $out/tgdpo_hf"
