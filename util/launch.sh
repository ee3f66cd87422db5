#!/bin/sh
# The common part of train.sh and test.sh: finds the config and the Python, then runs train.py or test.py (STAGE).
set -eu
cd "$(dirname "$0")/.."
stage=$1; shift
arch=${ARCH:-PI_CLIP} net=${NET:-resnet50}

fail() { echo "$stage.sh: $*" >&2; exit 2; }

usage() {
    cat >&2 <<EOF
usage: [ARCH=$arch] [NET=$net] sh $stage.sh EXP DATASET [GPUS] [Section.key=value ...] [--quiet] [--dry-run]
  EXP, DATASET, NET   pick config/DATASET/DATASET_EXP_NET.yaml
  GPUS                0 is the CPU; when left out: 1 if nvidia-smi lists a GPU, else 0
  Section.key=value   changes a key of the config; paths are relative to the repository
  --quiet             only warnings and errors on the console; --dry-run (train.sh): what it would do and take
  Runtime.processes=N splits the work among N processes on the CPU
several machines: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) in the environment;
  GPUS is then per machine, MAX_RESTARTS how often a failed run is restarted from its last checkpoint
example: sh $stage.sh split0 demo 0 Train.shot=5
EOF
    exit 2
}

# 1. what to run
case ${1:-} in "" | -h | --help) usage ;; esac
[ $# -ge 2 ] || usage
exp=$1 dataset=$2; shift 2
config=config/$dataset/${dataset}_${exp}_$net.yaml
only() { if [ $# -eq 1 ] && [ -f "$1" ]; then config=$1; fi; }  # an experiment with one network alone needs no NET
[ -n "${NET:-}" ] || [ -f "$config" ] || only "config/$dataset/${dataset}_${exp}_"*.yaml
near() { # WORD NAME...: ", did you mean NAME?" by edit distance
    word=$1; shift
    printf '%s\n' "$@" | awk -v w="$word" 'function least(a, b) { return a < b ? a : b }
        { n = length($0); for (j = 0; j <= n; j++) row[j] = j
          for (i = 1; i <= length(w); i++) { left = row[0]; row[0] = i; for (j = 1; j <= n; j++) { up = row[j]
              row[j] = least(least(up, row[j - 1]) + 1, left + (substr(w, i, 1) != substr($0, j, 1))); left = up } }
          if (best == "" || row[n] < d) { d = row[n]; best = $0 } }
        END { if (d <= length(w) / 2) print ", did you mean " best "?" }'
}
if [ ! -f "$config" ]; then
    sets=$(for file in config/*/*_*_*.yaml; do d=${file%/*}; d=${d#config/}; case ${file##*/} in "$d"_*) echo "$d" ;; esac; done | sort -u)
    [ -d "config/$dataset" ] || fail "unknown data set '$dataset'$(near "$dataset" $sets) There are:" $sets
    pairs=$(for file in "config/$dataset/${dataset}_"*_*.yaml; do s=${file##*/"${dataset}"_}; echo "${s%.yaml}"; done)
    exps=$(for pair in $pairs; do echo "${pair%%_*}"; done | sort -u)
    nets=$(for pair in $pairs; do case $pair in "${exp}"_*) echo "${pair#*_}" ;; esac; done)
    [ -n "$nets" ] || fail "$dataset has no experiment '$exp'$(near "$exp" $exps) There are:" $exps
    fail "no $config: for $dataset $exp there is NET =" $nets
fi

# 2. where: the third argument is the number of GPUs unless it is an override
case ${1:-} in
    "" | *=* | --*) if nvidia-smi -L 2>/dev/null | grep -q GPU; then gpus=1; else gpus=0; fi ;;
    *[!0-9]*) fail "GPUS must be a number, not '$1'" ;;
    *) gpus=$1; shift ;;
esac
processes=$gpus
for override; do
    case $override in
        Runtime.processes=*) [ "$gpus" -gt 0 ] || processes=${override#*=} ;;
        --*=* | --quiet | --dry-run | *.*=*) ;;
        *) fail "'$override' is not of the form Section.key=value" ;;
    esac
done
case $processes in "" | *[!0-9]*) fail "Runtime.processes must be a number, not '$processes'" ;; esac

# 3. with which Python: the active one when it has the packages, else .venv, prepared on first use
for candidate in python3 python3.13 python3.12 python3.11 python ""; do
    [ -n "$candidate" ] || fail "needs Python 3.11 or newer, and found none on the PATH"
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
python=$("$candidate" env.py python)

# 4. run; OpenMP threads that wait for each other sleep instead of spinning: on shared cores that is 20 times faster
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
set -- "$stage.py" --config "$config" --arch "$arch" --gpus "$gpus" "$@"
case $gpus in
    0) export CUDA_VISIBLE_DEVICES="" ;;
    1) ;;
    *) found=$("$python" -c 'import torch; print(torch.cuda.device_count())')
       [ "$gpus" -le "$found" ] || fail "asked for $gpus GPUs, torch sees $found" ;;
esac
if [ "${NNODES:-1}" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES also needs NODE_RANK (0..) and MASTER_ADDR"
    where="--nnodes=$NNODES --node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=${MASTER_PORT:-29500}"
else
    where=--standalone
fi
if [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then
    [ "$processes" -gt 0 ] || processes=1
    set -- -m torch.distributed.run $where --nproc_per_node="$processes" --max_restarts="${MAX_RESTARTS:-0}" "$@"
fi
echo "$stage.sh: $python $*"
exec "$python" "$@"
