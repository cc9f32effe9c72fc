#!/bin/sh
# Make the checkpoints from nothing: data, evaluator, denoiser, and the distilled denoiser. The shipped weights were made
# with these commands, in several runs (models/*.md), with the course's train.json as TRAIN. Without TRAIN, scenes are
# random. To resume, run it again: an interrupted rendering starts over, training continues from its state.
# TRIAL=FOLDER runs every stage at a tiny size, in two minutes, with data, runs and models in that folder.
set -eu
BIN=${BIN:-.venv/bin}
at=${TRIAL:-.}
export LABELGRID_STORAGE="$at/models"
mkdir -p "$at/models"
trainer() { "$BIN/python" -m trainer "$@"; }
render() { # NAME OPTIONS...
  folder="$at/data/$1"
  shift
  test -e "$folder/train.json" || trainer render "$folder" --size 64 "$@"
}

if test "${TRIAL:-}"; then
  TRAIN="" scenes="--scenes 20" more="--scenes 20" unseen="--scenes 20"
  fit="--steps 20" train="--steps 20 --set batch=16" trajectories="--trajectories 256 --steps 20 --set batch=16"
else
  scenes="" more="--scenes 6500" unseen="--scenes 700"
  fit="--minutes 30" train="--minutes 90" trajectories="--trajectories 6144 --steps 900"
fi

# unquoted on purpose: options of several words are split at blanks
render train64 --seed 0 $scenes ${TRAIN:+--train "$TRAIN"}
render placements64 --seed 77 $scenes ${TRAIN:+--train "$TRAIN"}
render evaluator64 --seed 1001 --objects 5 $more
render heldout64 --seed 2002 --objects 3 $unseen
trainer fit-evaluator --name iclevr-resnet18 --run "$at/runs/evaluator" $fit --data "$at/data/train64" \
  --data "$at/data/evaluator64" --data "$at/data/placements64" --held-out "$at/data/heldout64"
trainer train --data "$at/data/train64" --data "$at/data/placements64" --name iclevr-64 --run "$at/runs/denoiser" $train
trainer set-sampling iclevr-64 --sampler dpmpp_2m --steps 4 --guidance 1
trainer distill --data "$at/data/train64" --name iclevr-64-1step --run "$at/runs/distill" --method trajectories \
  --teacher iclevr-64 --guidance 1 --sampling-steps 1 --teacher-steps 4 --set warmup_steps=30 $trajectories
trainer promote iclevr-resnet18
trainer promote iclevr-64
trainer score "$at/data/heldout64/test.json"
