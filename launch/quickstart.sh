#!/usr/bin/env bash
# The whole mission at small scale, nothing mocked: an artificial language, a base model for it, a DPO guide trained
# under tensor parallelism, a TGDPO policy trained with that guide under pipeline parallelism, both exported to HF, and
# a table that compares them.
#
#   bash launch/quickstart.sh [OUT_DIR]             (default ./quickstart; must not exist or be empty)
#   bash launch/quickstart.sh --model DIR_OR_HUB_ID --pairs FILE [OUT_DIR]
#
# The second: a guide and a TGDPO policy from your model and those of your preference pairs that need not be cut, of a size
# that this machine does in minutes; the config that it writes is one to go on with. FILE: JSON, JSONL, Parquet or Arrow
# (docs/data.md).
# The first takes 5 to 6 minutes on 2 quiet CPU cores after installation. Uses the GPUs if there are any.
set -euo pipefail

fail() { echo "quickstart.sh: $*" >&2; exit 1; }

usage="usage: bash launch/quickstart.sh [--model DIR_OR_HUB_ID --pairs FILE] [OUT_DIR]"
model='' pairs='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --model | --pairs) [ $# -ge 2 ] || fail "$usage"
      if [ "$1" = --model ]; then model=$2; else pairs=$2; fi
      shift 2 ;;
    -*) fail "$usage" ;;
    *) [ -z "$out" ] || fail "$usage"
      out=$1
      shift ;;
  esac
done
{ [ -n "$model" ] && [ -n "$pairs" ]; } || [ -z "$model$pairs" ] || fail "--model and --pairs go together: $usage"
[ -z "$pairs" ] || [ -f "$pairs" ] || fail "--pairs $pairs: no such file"
# Both are used from the repository's root; what is no directory is a name of the Hub.
[ ! -d "$model" ] || model=$(cd "$model" && pwd)
[ -z "$pairs" ] || pairs=$(cd "$(dirname "$pairs")" && pwd)/$(basename "$pairs")
mkdir -p "${out:-quickstart}"
out=$(cd "${out:-quickstart}" && pwd)
[ -z "$(ls -A "$out")" ] || fail "$out is not empty: remove it or name another directory"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=.venv-quickstart
python=$root/$venv/bin/python

# But for a model of the Hub, everything the run needs is here or made here: nothing is fetched.
[ -n "$model" ] && [ ! -d "$model" ] || export HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
# Threads that wait for each other's part of a small model's products sleep: on a machine that does other things too,
# turning round meanwhile takes about twice as long.
export OMP_WAIT_POLICY=PASSIVE
# megatron-core warns of every fused part that is missing, many times over; the trainer's first lines say it once.
export PYTHONWARNINGS=ignore

stages=11
stage_number=0
stage_title=
stage() { # TITLE COMMAND...: runs one stage under a heading, and says how long it took
  stage_title=$1
  shift
  stage_number=$((stage_number + 1))
  printf '\n=== %d/%d %s\n' "$stage_number" "$stages" "$stage_title"
  local start=$SECONDS
  "$@"
  printf -- '--- %d s\n' "$((SECONDS - start))"
}
stage_failed() { fail "failed in stage $stage_number/$stages: $stage_title"; }
trap stage_failed ERR
set -E

single() { OMP_NUM_THREADS=$threads "$python" "$@"; }
ranks() { # COUNT COMMAND ARGS...
  local count=$1
  shift
  OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" -m tgdpo "$@"
}

preprocess() {
  for name in train validation; do
    single -m tgdpo preprocess --input "$out/data/$name.jsonl" --tokenizer "$out/base" \
      --output "$out/pairs/$name" --max-length 128 --max-prompt-length 32 --workers 2
  done
}

train() { # NAME RANKS OVERRIDES...
  local name=$1 count=$2
  shift 2
  ranks "$count" train "tools/examples/quickstart/$name.yaml" model.policy="$out/base_megatron" \
    data.train="$out/pairs/train" data.validation="$out/pairs/validation" output_dir="$out/$name" \
    precision.dtype="$dtype" "$@"
}

own_model() { # the same mission from a model and pairs that exist
  stages=5
  stage "environment $venv (installs on the first run)" bash launch/setup_env.sh "$venv"
  stage "a config for this machine" write_config
  stage "what would stop it" single -m tgdpo doctor "$out/tgdpo.yaml" --nproc "$count"
  stage "guide, policy, export, comparison" single -m tgdpo pipeline "$out/tgdpo.yaml" --nproc "$count" \
    --prompts 4 --max-new-tokens 64
  stage "what the guide rewards, and the course of both runs" pictures
  cat <<TEXT

aligned model (HF):       $hf
token by token:           $out/report.html
both trainings:           $out/runs.png
comparison with the base: $out/run/evaluation.json
to go on: more steps and data in $out/tgdpo.yaml, then
    $python -m tgdpo pipeline $out/tgdpo.yaml output_dir=$out/longer
TEXT
}
write_config() {
  count=$(single -m tools.examples.quickstart.own_model --model "$model" --pairs "$pairs" --out "$out")
  cat "$out/tgdpo.yaml"
}
pictures() {
  hf=$(echo "$out"/run/hf/step_*) # one: that of the last step
  single -m tgdpo report "$out/tgdpo.yaml" --policy "$hf" --pairs 8 --out "$out/report.html"
  single -m tgdpo plot "$out/run/guide" "$out/run" --out "$out/runs.png"
}

threads=$(getconf _NPROCESSORS_ONLN)
if [ -n "$model" ]; then
  own_model
  exit 0
fi

stage "environment $venv (installs on the first run)" bash launch/setup_env.sh "$venv"
installed=$SECONDS
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores < 4 ? cores : 4))
case $gpus in
  0) workers=2 dtype=fp32 ;;
  1) workers=1 dtype=bf16 ;;
  *) workers=2 dtype=bf16 ;;
esac
echo "$gpus GPUs, $cores cores: $workers ranks a training, $dtype"

stage "language: text and preference pairs" single -m tools.examples.quickstart.make_data --out "$out/data"
stage "base model: SentencePiece tokenizer and a small Llama" single -m tools.examples.quickstart.make_base \
  --data "$out/data" --out "$out/base"
stage "preference pairs to a Megatron-Core dataset" preprocess
stage "base model from HF to Megatron" single -m tgdpo convert to-megatron \
  --hf "$out/base" --out "$out/base_megatron"
stage "guide: DPO, tensor parallel over $workers" train dpo "$workers" parallel.tensor="$workers"
stage "guide to HF" single -m tgdpo convert to-hf --megatron "$out/dpo" --out "$out/dpo_hf"
stage "policy: TGDPO with the guide, pipeline parallel over $workers" train tgdpo "$workers" \
  model.guide="$out/dpo_hf" parallel.pipeline="$workers"
stage "policy to HF" single -m tgdpo convert to-hf --megatron "$out/tgdpo" --out "$out/tgdpo_hf"
stage "comparison" single -m tools.examples.quickstart.evaluate --base "$out/base" --model dpo="$out/dpo_hf" \
  --model tgdpo="$out/tgdpo_hf" --guide "$out/dpo_hf" --pairs "$out/data/heldout.jsonl" --beta 0.5 --out "$out/results.json"

stage "picture of both trainings" single -m tgdpo plot "$out/dpo" "$out/tgdpo" --out "$out/runs.png"

cat >"$out/generate.py" <<PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("$out/tgdpo_hf")
tokenizer = AutoTokenizer.from_pretrained("$out/tgdpo_hf")
prompt = [{"role": "user", "content": "write two sentences about the harbor"}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
PYTHON

printf '\n=== done in %d s after installation\n' "$((SECONDS - installed))"
cat <<TEXT
metrics:            $out/results.json
aligned model (HF): $out/tgdpo_hf
training curves:    $out/runs.png
                    $python -m tensorboard.main --logdir $out
to use the model, $out/generate.py:

$(sed 's/^/    /' "$out/generate.py")

$python $out/generate.py prints:

TEXT
single "$out/generate.py"
