#!/usr/bin/env bash
# A real Slurm of two emulated nodes on this machine, for tests: a controller and two node daemons, without cgroups.
#
#   emulator.sh start DIR      then: export SLURM_CONF=DIR/etc/slurm.conf; exits with 77 and the reason where impossible
#   emulator.sh stop DIR       cancels what runs and ends every daemon
#
# DIR holds everything and must have a short path (a socket's is limited to 107 bytes). Partitions: "high", and "low",
# whose jobs are requeued when "high" needs their nodes.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: emulator.sh start|stop DIR" >&2; exit 1; }
command=$1 dir=$2
export SLURM_CONF=$dir/etc/slurm.conf
export PATH=$PATH:/usr/sbin

unavailable() { echo "Slurm is not available: $*"; exit 77; }

install() {
  local programs=(slurmctld slurmd sbatch munged)
  [ "$(command -v "${programs[@]}" | wc -l)" != 4 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    unavailable "slurmctld, slurmd, slurm-client and munge are not installed, and only root with apt-get installs them"
  fi
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge; } >"$dir/log/apt.log" 2>&1 ||
    unavailable "installing slurmctld slurmd slurm-client munge failed: $(tail -n 1 "$dir/log/apt.log")"
}

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

write_config() {
  local user host port gpus
  user=$(id -un) host=$(hostname -s)
  # Two emulators at a time must not meet; below the ports that the system gives out by itself, and above those of runs,
  # which follow from the job's number (launch/train.sbatch).
  while :; do
    port=$((30000 + RANDOM % 690 * 4))
    in_use "$port" || in_use $((port + 1)) || in_use $((port + 2)) || break
  done
  # GPUs must be character devices, of which a user can make none.
  gpus='/dev/tty[0-7]'
  if [ "$(id -u)" = 0 ] && mknod "$dir/gpu0" c 1 3 2>/dev/null; then
    for number in 1 2 3 4 5 6 7; do mknod "$dir/gpu$number" c 1 3; done
    gpus="$dir/gpu[0-7]"
  fi
  printf '%s\n' AutoDetect=off "NodeName=n[1-2] Name=gpu File=$gpus" >"$dir/etc/gres.conf"
  # cred_expire: a requeued job waits for as long. MinJobAge: tests ask about jobs that have ended.
  cat >"$SLURM_CONF" <<TEXT
ClusterName=emulated
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=3600
FirstJobId=$((1 + RANDOM % 20000))
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=128 Sockets=2 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=20000 Gres=gpu:8 State=UNKNOWN
PartitionName=high Nodes=ALL Default=YES MaxTime=2-0 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=2-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
TEXT
}

daemons() {
  munged --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed" --num-threads=2 &&
    slurmctld -f "$SLURM_CONF" && slurmd -N n1 -f "$SLURM_CONF" && slurmd -N n2 -f "$SLURM_CONF"
}

start() {
  mkdir -p "$dir"/{etc,run,log,state,spool/n1,spool/n2}
  chmod 755 "$dir" "$dir"/{etc,run,log}
  install
  write_config
  (umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
  if ! daemons >"$dir/log/start.log" 2>&1; then
    stop
    unavailable "a daemon did not start: $(tail -n 1 "$dir/log/start.log")"
  fi
  for _ in $(seq 1200); do
    [ "$(sinfo -h -N -p high -o %T 2>/dev/null | grep -c '^idle$')" = 2 ] && return
    sleep 0.5
  done
  stop
  unavailable "the nodes did not come up in 10 minutes: $(tail -n 1 "$dir/log/slurmctld.log")"
}

stop() {
  if timeout 10 squeue -h >/dev/null 2>&1; then
    timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel --full --signal=KILL || true
    timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel || true
    for _ in $(seq 40); do [ -n "$(timeout 10 squeue -h)" ] || break; sleep 0.5; done
  fi
  local file
  for file in "$dir"/run/slurmd-n?.pid "$dir/run/slurmctld.pid" "$dir/run/munged.pid"; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
  # They write to DIR until they have ended, and then remove their files of process ids.
  for _ in $(seq 40); do compgen -G "$dir/run/*.pid" >/dev/null || break; sleep 0.25; done
}

case $command in
  start) start ;;
  stop) stop ;;
  *) echo "emulator.sh: $command: start or stop" >&2; exit 1 ;;
esac
