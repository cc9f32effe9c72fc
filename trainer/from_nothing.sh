#!/bin/sh
# From nothing to the shipped checkpoints: data, evaluator, denoiser, the same distilled. The shipped weights came about
# by these commands, in several runs (models/*.md), with the course's train.json as TRAIN; without it, random scenes do.
# Resumes by the same command.
set -eu
BIN=${BIN:-.venv/bin}
trainer() { "$BIN/python" -m trainer "$@"; }
have() { test -e "$1/train.json"; }

have data/train64 || trainer render data/train64 --size 64 --seed 0 ${TRAIN:+--train "$TRAIN"}
have data/placements64 || trainer render data/placements64 --size 64 --seed 77 ${TRAIN:+--train "$TRAIN"}
have data/evaluator64 || trainer render data/evaluator64 --size 64 --scenes 6500 --objects 5 --seed 1001
have data/heldout64 || trainer render data/heldout64 --size 64 --scenes 700 --objects 3 --seed 2002
test -e models/iclevr-resnet18.safetensors || trainer fit-evaluator --name iclevr-resnet18 --minutes 30 \
  --data data/train64 --data data/evaluator64 --data data/placements64 --held-out data/heldout64
trainer train --data data/train64 --data data/placements64 --name iclevr-64 --run runs/denoiser --minutes 90
trainer set-sampling iclevr-64 --sampler dpmpp_2m --steps 4 --guidance 1
trainer distill --data data/train64 --name iclevr-64-1step --method trajectories --teacher iclevr-64 --guidance 1 \
  --sampling-steps 1 --teacher-steps 4 --trajectories 6144 --steps 220 --set warmup_steps=30
trainer promote iclevr-resnet18
trainer promote iclevr-64
