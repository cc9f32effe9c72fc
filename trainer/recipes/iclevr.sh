#!/bin/sh
# Make every i-CLEVR model from nothing: pictures, then evaluator, denoiser, its distilled form, its upsampler, and both
# together as the default model, which draws a picture in one network call.
#
#   sh trainer/recipes/iclevr.sh              every stage, in order; `make train` calls it
#   FORM=short sh trainer/recipes/iclevr.sh   a quarter of the steps
#   TRIAL=FOLDER sh trainer/recipes/iclevr.sh every stage at a tiny size, in five minutes, all of it in that folder
#
# To resume, run it again: a stage continues from its run folder. An interrupted rendering starts over. A stage's
# checkpoint goes to stages/, beside a file NAME.done with its options when it ends. A stage with such a file is
# finished, also where it ended on another machine and was committed; remove the file to train it again. At the end the
# checkpoints are copied to models/.
# WITHOUT names a test file whose label sets no picture shows. The shipped weights had the course's novel.json there.
set -eu
BIN=${BIN:-.venv/bin}
at=${TRIAL:-.}
export LABELGRID_STORAGE="$at/stages"
mkdir -p "$at/stages" "$at/models"
trainer() { "$BIN/python" -m trainer "$@"; }

if test "${TRIAL:-}"; then
  scenes="--scenes 20" many="--scenes 4" unseen="--scenes 4" full="--scenes 3" places="--scenes 200"
  evaluator=20 denoiser=20 layouts=20 distilled=20 pixels=10 edges=10 windows=3 detail=3 together=3
  trajectories=256 small="--set batch=16"
else
  scenes="--scenes 6000" many="--scenes 1920" unseen="--scenes 120" full="--scenes 2000" places="--scenes 24000"
  trajectories=6144 small=""
  case ${FORM:-full} in
    full) evaluator=10800 denoiser=7200 layouts=12000 distilled=900 pixels=4000 edges=4000 windows=6000 detail=2000 together=12000 ;;
    short) evaluator=2700 denoiser=2400 layouts=3000 distilled=450 pixels=1000 edges=1000 windows=1500 detail=500 together=3000 ;;
    *) echo "FORM is $FORM; it may be full or short" >&2; exit 2 ;;
  esac
fi

render() { # NAME OPTIONS...
  folder="$at/data/$1"
  shift
  test -e "$folder/train.json" || trainer render "$folder" "$@" ${WITHOUT:+--without "$WITHOUT"}
}
stage() { # STAGE NAME COMMAND OPTIONS...: train the checkpoint NAME
  of="$1" name="$2"
  shift 2
  if test -e "$at/stages/$of.done"; then return; fi
  trainer train "$@" --name "$name" --run "$at/runs/$of"
  echo "$*" >"$at/stages/$of.done"
}

# unquoted on purpose: options of several words are split at blanks
render iclevr --size 64 --seed 100 $scenes
render many --size 64 --seed 200 --objects 10 --centre 0.25 $many
render heldout64 --size 64 --seed 3001 --objects 10 --centre 0.5 $unseen
render full --seed 905 --objects 10 --centre 0.5 $full
render places3 --no-pictures --seed 611 $places
render places10 --no-pictures --seed 612 --objects 10 --centre 0.25 $places

pictures="--data $at/data/iclevr --data $at/data/many --held-out $at/data/heldout64"
stage evaluator iclevr-resnet18 evaluator --steps $evaluator $pictures
stage denoiser iclevr-64 denoiser --steps $denoiser $pictures $small \
  --set 'network.channels=[64,128,192]' --set 'network.encoder_blocks=[0,1,1]'
stage layouts iclevr-64 layouts --steps $layouts --data "$at/data/places3" --data "$at/data/places10" \
  --set network.width=96 --set network.dropout=0
trainer configure iclevr-64 --sampler dpmpp_2m --steps 5 --spacing logsnr --guidance 1.4 --interval 0.1 0.5
stage distilled iclevr-64-1step distilled --steps $distilled --data "$at/data/many" --teacher iclevr-64 \
  --guidance 1 --sampling-steps 1 --teacher-steps 4 --trajectories $trajectories --set warmup_steps=30 $small

large="--data $at/data/full"
stage pixels iclevr-320x240 upsampler --steps $pixels $large --base iclevr-64 --set adversarial=0
stage edges iclevr-320x240 upsampler --steps $edges $large --base iclevr-64 --start-from iclevr-320x240
stage windows iclevr-320x240-1step one-step --steps $windows $large --base iclevr-64-1step \
  --set windows_alone=true --set batch=4 --set optimizer=muon --set lr=0.003
stage detail iclevr-320x240-1step one-step --steps $detail $large --base iclevr-64-1step \
  --start-from iclevr-320x240-1step --set adversarial=0
stage together iclevr-320x240-1step one-step --steps $together $large --base iclevr-64-1step \
  --start-from iclevr-320x240-1step

trainer promote iclevr-resnet18
trainer promote iclevr-320x240-1step
trainer score "$at/data/heldout64/test.json" --repeats 1
cp "$at"/stages/*.safetensors "$at"/stages/*.json "$at"/stages/*.md "$at"/stages/*-log.* "$at/models/"
