#!/bin/sh
# Install labelgrid and some of its extras at the versions of requirements.txt, and check the hash of every download.
#
#   sh lock/install.sh PYTHON EXTRA[,EXTRA...]     from the repository's root
#
# PyPI's torch for Linux is the CUDA build. TORCH_INDEX (an index, such as that of the CPU build) or PIP_FIND_LINKS (a folder
# of wheels) give another build of the same version. The lock has no hash of those: whoever sets the variable trusts the place.
set -eu
python=$(command -v "$1") extras=$2  # uv takes a path only for a Python outside virtual environments
lock=lock/requirements.txt

"$python" -m pip install --quiet --no-deps --require-hashes --requirement lock/uv.txt
install() { "$python" -m uv pip install --python "$python" "$@"; }
labelgrid() { install --constraint $lock --build-constraint $lock --editable ".[$extras]" "$@"; }

torch=$(labelgrid --dry-run 2>&1 | sed -nE 's/^ \+ ((torch|torchvision)==[^ ]+).*/\1/p')  # those that are missing
if test "$torch"; then
  # torch comes from its place alone: with two indexes for one install, whoever can publish a name on one of them could
  # replace any package of the other.
  if test "${TORCH_INDEX:-}"; then
    install --quiet --no-deps --default-index "$TORCH_INDEX" $torch
  elif test "${PIP_FIND_LINKS:-}"; then
    install --quiet --no-deps --no-index --find-links "$PIP_FIND_LINKS" $torch 2>/dev/null || echo "no" $torch "in $PIP_FIND_LINKS"
  fi
  # Byte code of torch and of what it imports late, while the rest is fetched: else each of the first processes would
  # compile it.
  packages=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  "$python" -m compileall -qq "$packages/torch" || true &
fi
labelgrid --quiet
wait
