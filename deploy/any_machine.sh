#!/bin/sh
# Run `make demo` in an empty container with the distribution's own Python, and print its seconds from nothing.
#
#   sh deploy/any_machine.sh ubuntu:24.04        # needs Docker; debian:13, fedora:43 and others too
#
# The container gets the files of HEAD, the distribution's make and Python, and TORCH_INDEX if that is set.
set -eu
image=$1
cd "$(dirname "$0")/.."

git archive HEAD | docker run --rm --interactive --env TORCH_INDEX --env DEBIAN_FRONTEND=noninteractive "$image" sh -euc '
mkdir labelgrid && cd labelgrid && tar -x
begun=$(date +%s)
if command -v apt-get >/dev/null; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends make python3-venv ca-certificates >/dev/null
else
  dnf install -y -q make python3 >/dev/null
fi
installed=$(date +%s)
make .venv/.demo
set_up=$(date +%s)
make demo
ended=$(date +%s)
test -s grid.png
. /etc/os-release
echo "1 passed, 0 failed: $PRETTY_NAME, $(.venv/bin/python --version): $((ended - begun)) s from nothing:" \
  "$((installed - begun)) s for packages, $((set_up - installed)) s to set up, $((ended - set_up)) s to draw"
' 2>&1
