#!/usr/bin/env bash
# The tests with the lowest, the shipped and the newest versions of what bigvivit depends on.
#
#   tests/versions.sh lowest|shipped|newest   make that environment, run the default suite in it, keep its result
#   tests/versions.sh table                   all kept results as a report in bench/results and the table of docs/installation.md
#   tests/versions.sh short                   lowest versions: import, plan, replay, three training steps on real clips
#   tests/versions.sh goldens                 record the default suite's memory goldens, in the environments that are there and
#                                             for every torch that is supported; those of slow tests are the shipped versions' own
#
# lowest: the lower bounds of pyproject.toml on the oldest Python; shipped: what ./launch.sh installs; newest: the newest
# of everything on the newest Python. Environments lie in .versions/, 6 GB each. PYTHON=... chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
HERE=$PWD
OLDEST=(3.10 3.11 3.12) NEWEST=(3.14 3.13 3.12)
TORCHES=(2.11 2.12 2.13 2.14 2.15) # with the newest of all else
LIMIT=${LIMIT:-1800} # seconds that installing may take: an index that does not answer must not hold anybody up

fail() { echo "error: $*" >&2; exit 1; }

find_python() { # versions, the preferred one first
  local version python
  [ -n "${PYTHON:-}" ] && { echo "$PYTHON"; return; }
  for version in "$@"; do
    for python in "python$version" "$(pyenv root 2>/dev/null)/versions/$version".*/bin/python; do
      "$python" -c 'import venv' 2>/dev/null && { command -v "$python"; return; }
    done
  done
  fail "none of Python $* is here: install one, or name one, PYTHON=..."
}

make_environment() { # name, interpreter, words for pip
  local name=$1 python=$2 env=.versions/$1; shift 2
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  echo "installing the $name versions into $env with $("$python" --version)"
  timeout "$LIMIT" "$env/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  timeout "$LIMIT" "$env/bin/python" -m pip install --quiet --disable-pip-version-check --prefer-binary "$@" ||
    fail "the $name versions could not be installed within $LIMIT s"
}

make_lowest() {
  local python; python=$(find_python "${OLDEST[@]}")
  mkdir -p .versions
  python3 tests/versions.py bounds > .versions/lowest.txt
  make_environment lowest "$python" --constraint .versions/lowest.txt --editable '.[test]'
}

make_newest() {
  local python; python=$(find_python "${NEWEST[@]}")
  make_environment newest "$python" --upgrade --upgrade-strategy eager --editable '.[test,torchcodec]'
}

run_suite() { # name
  local code=0
  PATH="$PWD/.versions/$1/bin:$PATH" ".versions/$1/bin/python" -m pytest --junitxml ".versions/$1.xml" || code=$?
  ".versions/$1/bin/python" tests/versions.py keep "$1"
  return $code
}

short() {
  local bin=$PWD/.versions/lowest/bin clips=$PWD/../shared/data/egogestar work=$PWD/.versions/short
  rm -rf "$work"; mkdir -p "$work"; cd "$work"
  "$bin/python" -c 'import bigvivit; print("bigvivit", bigvivit.__version__)'
  "$bin/bigvivit" plan --tower vit-b --frames 16 --hardware "RTX 3090"
  "$bin/bigvivit" plan --tower vit-demo --size 48 --frames 8 --hardware "RTX 3090" --ranks 2 --ds zero3
  "$bin/python" "$HERE/tests/versions.py" snapshot snapshot.pickle
  "$bin/bigvivit" replay snapshot.pickle
  if [ -d "$clips" ]; then
    "$bin/python" "$HERE/tests/versions.py" manifest "$clips" train.csv
  else
    echo "no real clips beside the checkout: the demo's are taken"
    "$bin/bigvivit" demo clips --train-clips 16 --val-clips 8
    ln -s clips/train.csv train.csv
  fi
  "$bin/bigvivit" train --stage 1 --out run --data.train train.csv --data.workers 1 --clip.frames 8 --clip.stride 2 \
    --clip.size 48 --clip.resize 52 --model.tower vit-demo --model.tower-init random --optim.batch-size 4 \
    --optim.epochs 1 --optim.warmup-epochs 0 --log-every 1
  grep -q '"step": 3' run/metrics.jsonl || fail "training did not make three steps"
  "$bin/bigvivit" doctor
}

record() { # name: the memory goldens of the default suite with an environment's versions
  PATH="$PWD/.versions/$1/bin:$PATH" ".versions/$1/bin/python" -m pytest -q --update-memory-goldens \
    -k "take_what or takes_what or measured_by" tests/test_memory_regression.py
}

goldens() {
  local torch name python; python=$(find_python "${NEWEST[@]}")
  for name in lowest shipped newest; do
    [ ! -x ".versions/$name/bin/python" ] || record "$name"
  done
  for torch in "${TORCHES[@]}"; do
    make_environment goldens "$python" --upgrade "torch==$torch.*" torchvision --editable '.[test]'
    record goldens
  done
}

case "${1:-}" in
  lowest) make_lowest; run_suite lowest ;;
  shipped) make_environment shipped "${PYTHON:-python3}" --editable '.[test]'; run_suite shipped ;;
  newest) make_newest; run_suite newest ;;
  table) .versions/shipped/bin/python tests/versions.py table ;;
  short) make_lowest; short ;;
  goldens) goldens ;;
  *) fail "tests/versions.sh knows lowest, shipped, newest, table, short and goldens; not '${1:-}'" ;;
esac
