#!/usr/bin/env bash
# ./launch.sh            the whole method on generated clips: both stages, everything trained beside them, one table
# ./launch.sh test       the tests
# ./launch.sh train ...  deepspeed bigvivit/train.py ...
# Each sets up .venv first, once, with uv where it is installed, else with pip. PYTHON=python3.12 chooses another
# interpreter.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

# uv reads nothing of pip's configuration, where an internal index, a proxy or a certificate may stand.
configure_uv() { # the interpreter whose pip is asked
  local key value
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # all indexes are alike, as they are to pip
  while IFS='=' read -r key value; do
    value=${value#\'}; value=${value%\'}
    value=$(printf '%b' "$value" | xargs) # lists have a line for each entry, or spaces between them
    case ${key##*.} in
      index-url) export UV_DEFAULT_INDEX=$value ;;
      extra-index-url) export UV_INDEX=$value ;;
      find-links) export UV_FIND_LINKS=${value// /,} ;;
      constraint) export UV_CONSTRAINT=$value ;;
      trusted-host) export UV_INSECURE_HOST=$value ;;
      cert) export SSL_CERT_FILE=$value ;;
      proxy) export HTTPS_PROXY=$value ;;
    esac
  done < <("$1" -m pip config list 2>/dev/null)
}

install() { # interpreter, extras
  if command -v uv >/dev/null; then
    configure_uv "$1"
    [ -x .venv/bin/python ] || uv venv --quiet --seed --python "$1" .venv
    uv pip install --quiet --python .venv/bin/python --editable ".[$2]"
  else
    [ -x .venv/bin/python ] || "$1" -m venv .venv || fail "$1 has no working venv module: install python3-venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$2]"
  fi || fail "installing failed, see above; an index of your own or a proxy is taken from pip's configuration (pip config list)"
}

setup() {
  local python=${PYTHON:-python3} stamp=.venv/installed extras=$1
  local wanted; wanted="$extras $(cksum < pyproject.toml)"
  [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && return
  command -v "$python" >/dev/null || fail "$python is not on PATH: install Python 3.10 or newer, or name one: PYTHON=... ./launch.sh"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old: bigvivit needs Python 3.10 or newer"
  [ -w . ] || fail "$PWD cannot be written, where .venv goes: copy the checkout, or pip install it into an environment of yours and call bigvivit"
  echo "installing bigvivit[$extras] into .venv (once; PyTorch is large)"
  install "$python" "$extras"
  echo "$wanted" > $stamp
}

# Ranks: one per GPU that CUDA_VISIBLE_DEVICES leaves; on a machine without, two on the CPU, which share its cores.
VISIBLE=() # numbers of GPUs, where it says any
choose_ranks() {
  RANKS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  if [ "$RANKS" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    [[ $CUDA_VISIBLE_DEVICES =~ ^(-1|[0-9,]*)$ ]] ||
      fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher knows GPUs by number alone, such as 0,1"
    [ "$CUDA_VISIBLE_DEVICES" = -1 ] || IFS=, read -ra VISIBLE <<< "$CUDA_VISIBLE_DEVICES"
    RANKS=${#VISIBLE[@]}
  fi
  [ "$RANKS" -gt 0 ] && return
  RANKS=2
  local cores; cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > RANKS ? cores / RANKS : 1 ))}
}

choose_launcher() {
  LAUNCHER=(deepspeed --log_level warning --num_gpus "$RANKS") # beside which it passes over CUDA_VISIBLE_DEVICES
  [ ${#VISIBLE[@]} -eq 0 ] ||
    LAUNCHER=(deepspeed --log_level warning --include "localhost:$(IFS=,; echo "${VISIBLE[*]:0:RANKS}")")
}

# The demo: stage 1 on 8 frames, stage 2 on 32, and beside them everything trained on 32. Its labels have a direction,
# so clips are not mirrored.
DEMO=(--data.train data/demo/train.csv --data.workers 1 --optim.batch-size 16 --log-every 25
  --optim.name adamw --optim.lr 1e-3 --optim.weight-decay 0.05
  --clip.size 48 --clip.resize 52 --clip.min-scale 0.95 --clip.max-scale 1.2 --clip.no-flip)
NEW=(--model.tower vit-demo --model.tower-init random --model.temporal-depth 2)

train() { # folder of the run, then arguments of bigvivit/train.py
  local out=$1; shift
  [ -f "$out/checkpoint.json" ] && { echo "$out is there already"; return; }
  "${LAUNCHER[@]}" bigvivit/train.py --ds ds_configs/zero3.json --out "$out" "$@"
}

evaluate() { # folder of the run
  [ -f "$1/eval.json" ] || bigvivit eval "$1" --manifest data/demo/val.csv --views 1 --crops 1 --shuffle-frames
}

main() {
  case "${1:-demo}" in
    test)
      setup dev; shift
      export PATH="$PWD/.venv/bin:$PATH"
      exec python -m pytest "$@" ;;
    train)
      setup dev; shift
      export PATH="$PWD/.venv/bin:$PATH"
      choose_ranks
      choose_launcher
      exec "${LAUNCHER[@]}" bigvivit/train.py "$@" ;;
    demo) ;;
    *) fail "./launch.sh knows 'test' and 'train ...', or nothing at all; not '$1'" ;;
  esac
  [ -w . ] || fail "$PWD cannot be written, where the demo's clips and runs go: copy the checkout"
  setup dev
  export PATH="$PWD/.venv/bin:$PATH"
  choose_ranks
  while [ $((16 % RANKS)) -ne 0 ]; do RANKS=$((RANKS - 1)); done # the demo's batch of 16 divides over its ranks
  choose_launcher
  bigvivit demo data/demo
  train runs/demo/stage1 --stage 1 "${DEMO[@]}" "${NEW[@]}" --clip.frames 8 --optim.epochs 8 --optim.warmup-epochs 1
  train runs/demo/stage2 --stage 2 "${DEMO[@]}" --clip.frames 32 --init-from runs/demo/stage1 \
    --optim.epochs 6 --optim.warmup-epochs 1
  train runs/demo/everything --stage 1 "${DEMO[@]}" "${NEW[@]}" --clip.frames 32 --optim.epochs 3 --optim.warmup-epochs 0.5
  local run
  for run in stage1 stage2 everything; do evaluate "runs/demo/$run"; done
  bigvivit report runs/demo/stage1 runs/demo/stage2 runs/demo/everything
}

main "$@"
