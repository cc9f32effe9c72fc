#!/bin/sh
# Write the lock files anew after a change of pyproject.toml. Pins stay where they still fit; --upgrade renews them all.
#
#   sh lock/update.sh PYTHON [--upgrade]     from the repository's root; PYTHON has uv
#
# The files name no package index: an install uses the one that is set up where it runs.
set -eu
python=$1
shift
export UV_CUSTOM_COMPILE_COMMAND="make lock"
compile() { "$python" -m uv --quiet pip compile --universal --python-version 3.11 --generate-hashes "$@" >/dev/null; }

compile --all-extras pyproject.toml --output-file lock/requirements.txt "$@"
echo uv | compile - --output-file lock/uv.txt "$@"
