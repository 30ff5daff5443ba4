#!/usr/bin/env bash
# Trains without Slurm on this machine, or under torchrun on several. Start the same command again to continue.
#
#   bash launch/train.sh config.yaml [section.key=value ...]
#
#   NPROC_PER_NODE   ranks on this machine (default: its GPUs, or 1 without any)
#   NNODES           machines (default 1). With more, start the same command on each, with
#   RDZV_ENDPOINT    HOST:PORT of one of them, the same everywhere, and
#   RDZV_ID          a name of this start, the same everywhere (default: tgdpo)
#
# Ctrl-C, or TERM or USR1 to this script (kill PID), saves after the step that is running, and ends; Ctrl-C after that
# ends at once. Environment: launch/env.sh.
set -euo pipefail

fail() { echo "train.sh: $*" >&2; exit 1; }

[ $# -ge 1 ] || fail "usage: bash launch/train.sh config.yaml [section.key=value ...]"
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# To the ranks and not to torchrun, which would give them no more than 30 seconds; before it has any, it may just end.
launcher=
signalled=
# shellcheck disable=SC2317 # the traps call it
forward() {
  signalled=1
  [ -z "$launcher" ] || pkill "-$1" -P "$launcher" || kill -TERM "$launcher" 2>/dev/null || true
}
trap 'forward TERM' TERM USR1 HUP
trap 'forward INT' INT

status=0
output_dir=$("$python" -m megatron_tgdpo.resilience.requeue "$@") || status=$?
case $status in
  0) ;;
  3) echo "train.sh: finished already: $output_dir/DONE" && exit 0 ;;
  *) exit "$status" ;;
esac
[ -z "$signalled" ] || fail "asked to stop before it began"

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
nproc=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
command=(-m tgdpo train --nproc "$nproc")
if [ "${NNODES:-1}" -gt 1 ]; then
  [ -n "${RDZV_ENDPOINT:-}" ] || fail "NNODES is $NNODES but RDZV_ENDPOINT is not set: export HOST:PORT of one node"
  command=(-m torch.distributed.run --nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
    --rdzv-id "${RDZV_ID:-tgdpo}" --nproc-per-node "$nproc" -m tgdpo train)
fi
# In a process group of its own: the terminal's Ctrl-C reaches this script alone.
set -m
"$python" "${command[@]}" "$@" &
launcher=$!
set +m
while :; do
  signalled=
  status=0
  wait "$launcher" || status=$?
  # A signal interrupts wait, whose status then says nothing about the launcher.
  [ -n "$signalled" ] || break
done
if [ "$status" != 0 ] && [ ! -f "$output_dir/DONE" ]; then
  echo "train.sh: not finished; start the same command again to continue" >&2
fi
exit "$status"
