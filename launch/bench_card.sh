#!/usr/bin/env bash
# Measures streaming and training on the card of this machine, at published sizes with random weights: docs/benchmarks.md.
#
#     launch/bench_card.sh FOLDER [PATTERN]        e.g. launch/bench_card.sh runs/h200 'live-frame'
#
# Each measurement is a process of its own and leaves FOLDER/NAME/report.json; one that is there already is not made
# again, and one that fails (out of memory, a missing extra) does not stop the others. Needs the extras cuda and parity.
set -uo pipefail
out=${1:?expected a folder for the reports} pattern=${2:-.}
python=${PYTHON:-python}

measure() {
  local name=$1
  shift
  [[ $name =~ $pattern ]] || return 0
  [ ! -e "$out/$name/report.json" ] || return 0
  echo "== $name: $*"
  "$python" -m jstream.bench "$@" --out="$out/$name" || echo "== $name: failed" >&2
}

live=configs/videollm_online.py
for slots in 2048 8192 32768; do
  measure "live-frame-$slots" --mode=frame --config=$live --slots=$slots --steps=2000
  measure "live-reply-$slots" --mode=reply --config=$live --slots=$slots --steps=500
  measure "live-int8-frame-$slots" --mode=frame --config=$live --config.model.decoder.int8=true --slots=$slots --steps=2000
  measure "streamo-7b-frame-$slots" --mode=frame --config=configs/streamo.py:7b --slots=$slots --steps=2000
done
measure streamo-3b-frame-8192 --mode=frame --config=configs/streamo.py:3b --slots=8192 --steps=2000
measure streamo-3b-reply-8192 --mode=reply --config=configs/streamo.py:3b --slots=8192 --steps=500
measure live-peer-8192 --mode=peer --config=$live --slots=8192 --steps=200
measure live-engine-48 --mode=engine --config=$live --streams=48 --frames=60
measure tiny-longrun-sinks --mode=longrun --memory=sinks --frames=10000
measure tiny-longrun-hop --mode=longrun --memory=hop --frames=10000
measure live-train --mode=train --config=$live --steps=50 --turns=120 --rows=1 --frames=640 --tokens=8192
measure streamo-3b-train --mode=train --config=configs/streamo.py:3b --steps=50 --rows=1 --frames=64 --tokens=8192
XLA_PYTHON_CLIENT_PREALLOCATE=false measure live-train-peer --mode=train --peer --config=$live --steps=50 --turns=120 \
  --rows=1 --frames=320 --tokens=4096
