#!/bin/sh
# Write the lock files anew after a change of pyproject.toml. Pins stay where they still fit; --upgrade renews them all.
#
#   sh lock/update.sh PYTHON [--upgrade]     from the repository's root; PYTHON has uv
#
# The files name no package index: an install uses the one that is set up where it runs. They hold for Python 3.11 to 3.14 on
# Linux (x86 with glibc 2.28, Arm with 2.35) and macOS 14 (Arm; there is no torch for its x86). At the end this looks for a wheel
# of every pin on each of them.
set -eu
python=$1
shift
export UV_CUSTOM_COMPILE_COMMAND="make lock"
compile() { "$python" -m uv --quiet pip compile --universal --python-version 3.11 --generate-hashes "$@" >/dev/null; }

compile --all-extras pyproject.toml --output-file lock/requirements.txt "$@"
echo uv | compile - --output-file lock/uv.txt "$@"

export MACOSX_DEPLOYMENT_TARGET=14.0
for version in 3.11 3.12 3.13 3.14; do
  for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_35 aarch64-apple-darwin; do
    "$python" -m uv --quiet pip compile --extra dev --constraint lock/requirements.txt --only-binary :all: \
      --python-version $version --python-platform $platform pyproject.toml >/dev/null
  done
done
