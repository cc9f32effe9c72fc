#!/bin/sh
# Make the checkpoints from nothing: data, evaluator, denoiser, its distilled form, its upsampler, and both together as
# the default model, which draws a picture in one network call. The shipped weights were made with these commands, in
# several runs, and the default model by scripts with the same losses (models/*.md), with the course's train.json as
# TRAIN. Without TRAIN, scenes are random. WITHOUT names a test file whose label sets the other scenes never show. To
# resume, run it again: an interrupted rendering starts over, training continues from its state. TIMES=4 takes four times
# as many steps.
# TRIAL=FOLDER runs every stage at a tiny size, in five minutes, with data, runs and models in that folder.
set -eu
BIN=${BIN:-.venv/bin}
at=${TRIAL:-.}
export LABELGRID_STORAGE="$at/models"
mkdir -p "$at/models"
trainer() { "$BIN/python" -m trainer "$@"; }
render() { # NAME OPTIONS...
  folder="$at/data/$1"
  shift
  test -e "$folder/train.json" || trainer render "$folder" "$@"
}

if test "${TRIAL:-}"; then
  TRAIN="" scenes="--scenes 20" many="--scenes 4" unseen="--scenes 4" full="--scenes 3"
  fit="--steps 20" train="--steps 20 --set batch=16"
  trajectories="--trajectories 256 --steps 20 --set batch=16" upsample="--steps 10"
  painter="--steps 3" detail="--steps 3" edges="--steps 3"
else
  scenes="" many="--scenes 1920" unseen="--scenes 120" full="--scenes 480"
  times=${TIMES:-1}
  fit="--steps $((3600 * times))" train="--steps $((2400 * times))" upsample="--steps $((2000 * times))"
  trajectories="--trajectories 6144 --steps 900"
  painter="--steps $((1000 * times))" detail="--steps $((1000 * times))" edges="--steps $((5000 * times))"
fi

# unquoted on purpose: options of several words are split at blanks
render iclevr --size 64 --seed 100 $scenes ${TRAIN:+--train "$TRAIN"}
render many --size 64 --seed 200 --objects 10 --centre 0.25 $many ${WITHOUT:+--without "$WITHOUT"}
render heldout64 --size 64 --seed 3001 --objects 10 --centre 0.5 $unseen
render full --seed 905 --objects 10 --centre 0.5 $full
trainer train evaluator --name iclevr-resnet18 --run "$at/runs/evaluator" $fit --data "$at/data/iclevr" \
  --data "$at/data/many" --held-out "$at/data/heldout64"
trainer train denoiser --data "$at/data/iclevr" --data "$at/data/many" --held-out "$at/data/heldout64" --name iclevr-64 \
  --run "$at/runs/denoiser" $train
trainer configure iclevr-64 --sampler dpmpp_2m --steps 5 --spacing logsnr --guidance 1.4 --interval 0.1 0.5
trainer train distilled --data "$at/data/iclevr" --name iclevr-64-1step --run "$at/runs/distill" \
  --teacher iclevr-64 --guidance 1 --sampling-steps 1 --teacher-steps 4 --set warmup_steps=30 $trajectories
enlarge() { # RUN OBJECTIVE BASE NAME OPTIONS...
  run="$at/runs/$1" objective="$2" base="$3" name="$4"
  shift 4
  trainer train "$objective" --data "$at/data/full" --base "$base" --name "$name" --run "$run" "$@"
}
enlarge pixels upsampler iclevr-64 iclevr-320x240 $upsample --set adversarial=0
enlarge upsampler upsampler iclevr-64 iclevr-320x240 $upsample --start-from iclevr-320x240
enlarge painter one-step iclevr-64-1step iclevr-320x240-1step $painter \
  --set painter_alone=true --set batch=8 --set optimizer=muon --set lr=0.003
enlarge detail one-step iclevr-64-1step iclevr-320x240-1step $detail --start-from iclevr-320x240-1step --set adversarial=0
enlarge edges one-step iclevr-64-1step iclevr-320x240-1step $edges --start-from iclevr-320x240-1step
trainer promote iclevr-resnet18
trainer promote iclevr-320x240-1step
trainer score "$at/data/heldout64/test.json" --repeats 1
