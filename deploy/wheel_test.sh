#!/bin/sh
# Install the wheel into an empty environment, run the service from an empty folder, and draw a picture with it.
#
#   sh deploy/wheel_test.sh PYTHON WHEEL
#
# torch comes from where pip finds it, or from TORCH_INDEX. Above Python 3.11 a redis-server must be on PATH.
set -eu
python=$1 wheel=$(realpath "$2")
port=${PORT:-8765}
at=$(mktemp -d)
server=
finish() {
  test -z "$server" || { kill "$server" && wait "$server" || true; }
  rm -rf "$at"
}
trap finish EXIT

"$python" -m venv "$at/venv"
bin=$at/venv/bin
test -z "${TORCH_INDEX:-}" || "$bin/pip" install --quiet --no-deps --index-url "$TORCH_INDEX" torch
"$bin/pip" install --quiet "labelgrid[serve] @ file://$wheel"

mkdir "$at/empty"
cd "$at/empty"
"$bin/python" -c "from labelgrid import AsyncClient, Client"
"$bin/labelgrid" --help >/dev/null
"$bin/labelgrid" serve --port "$port" >"$at/log" 2>&1 &
server=$!
for _ in $(seq 600); do
  grep -q "labelgrid is ready" "$at/log" && break
  kill -0 "$server" 2>/dev/null || break
  sleep 1
done
"$bin/labelgrid" generate "red cube" --url "http://127.0.0.1:$port" -o grid.png || { cat "$at/log"; exit 1; }
"$bin/python" -c "from PIL import Image; Image.open('grid.png').verify()"
echo "1 passed, 0 failed: $("$bin/python" --version), $(basename "$wheel")"
