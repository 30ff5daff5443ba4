# shellcheck shell=bash disable=SC2034 # variables are for those that source this
# What training needs in its environment, for train.sbatch, train.sh and pipeline.sh, which source this file. What is
# set already stays as it is: export yours before submitting, or edit this file for your site.

# The python to use, with this project installed: of an active environment, or of the container.
python=${TGDPO_PYTHON:-python}

# --- Threads -----------------------------------------------------------------------------------------------------------
# Ranks share a node's cores: more threads than a rank's share makes all of them slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Tokenising has processes of its own (data.workers); threads beside them fight for the same cores.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# --- GPUs and NCCL -----------------------------------------------------------------------------------------------------
# One hardware queue keeps kernels in the order of issue, which is how megatron-core overlaps tensor parallel traffic.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Packs of one size and checkpoints of another fragment GPU memory otherwise.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Warnings name a broken link or a wrong interface; INFO says which interfaces and protocols NCCL took.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# NCCL and gloo choose an interface by themselves. Where they choose the wrong one (ranks never meet, or InfiniBand is
# idle), set these for your site:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# --- Python ------------------------------------------------------------------------------------------------------------
# Logs of a job that is killed must not end in a buffer.
export PYTHONUNBUFFERED=1
# Models and tokenizers are directories; compute nodes often have no way out, and would wait for one.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# --- Container (Slurm only) --------------------------------------------------------------------------------------------
#   TGDPO_CONTAINER    image: a .sif file for apptainer, a .sqsh file or registry image for pyxis; empty: no container
#   TGDPO_RUNTIME      apptainer or pyxis (which runs enroot); default: apptainer
#   TGDPO_MOUNTS       HOST:CONTAINER[,HOST:CONTAINER...]; paths in the config must be the same inside and outside
srun_options=()
prefix=()
if [ -n "${TGDPO_CONTAINER:-}" ]; then
  case ${TGDPO_RUNTIME:-apptainer} in
    apptainer)
      prefix=(apptainer exec --nv --pwd "$PWD" ${TGDPO_MOUNTS:+--bind "$TGDPO_MOUNTS"} "$TGDPO_CONTAINER")
      ;;
    pyxis)
      srun_options=(--container-image="$TGDPO_CONTAINER" --container-workdir="$PWD"
        ${TGDPO_MOUNTS:+--container-mounts="$TGDPO_MOUNTS"})
      ;;
    *)
      echo "TGDPO_RUNTIME is '$TGDPO_RUNTIME': choose apptainer or pyxis" >&2
      exit 1
      ;;
  esac
fi
