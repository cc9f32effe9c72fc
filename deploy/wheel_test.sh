#!/bin/sh
# Install the wheel into an empty environment, run the service from an empty folder, draw and score pictures, and stop it.
#
#   sh deploy/wheel_test.sh PYTHON WHEEL
#
# pip fetches packages as it does on this machine, torch from TORCH_INDEX if that is set, but compiles nothing. What is
# installed then runs with an environment, HOME and PATH of its own: on the PATH there is no Redis server.
set -eu
unset PYTHONPATH PYTHONHOME
python=$(command -v "$1") wheel=$(realpath "$2")
port=${PORT:-8765}
at=$(mktemp -d)
server=
finish() {
  test -z "$server" || { kill "$server" 2>/dev/null && wait "$server" || true; }
  rm -rf "$at"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
fail() { echo "wheel-test: $1" >&2; cat "$at/log"; exit 1; }

mkdir "$at/home" "$at/path" "$at/tmp" "$at/empty"
cd "$at/empty"
"$python" -m venv "$at/venv"
bin=$at/venv/bin
test -z "${TORCH_INDEX:-}" || "$bin/pip" install --quiet --no-deps --index-url "$TORCH_INDEX" torch
"$bin/pip" install --quiet --only-binary :all: "labelgrid[serve] @ file://$wheel"

isolated="env -i HOME=$at/home PATH=$at/path TMPDIR=$at/tmp"
labelgrid() { $isolated "$bin/labelgrid" "$@"; }

start() {
  : >"$at/log"  # without the line that the loop below waits for
  $isolated "$bin/labelgrid" serve --port "$port" >>"$at/log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    ! grep -q "labelgrid is ready" "$at/log" || return 0
    kill -0 "$server" 2>/dev/null || break
    sleep 1
  done
  fail "the service did not start"
}
end() {  # by a signal; the service must end with 0, and leave neither files nor processes
  kill -s "$1" "$server"
  code=0
  wait "$server" || code=$?
  server=
  test "$code" -eq 0 || fail "serve ended with $code on SIG$1"
  ! ls "$at/tmp" | grep labelgrid || fail "serve left its files"
  ! ps -A -o args | grep -F "$bin/" | grep -vq grep || fail "serve left a process"
}

$isolated "$bin/python" -c "from labelgrid import AsyncClient, Client"
labelgrid --help >/dev/null
$isolated "$bin/python" -c "from labelgrid import load; load()([['red cube']], seed=7).save('one.png')"
"$bin/python" -c "from PIL import Image; Image.open('one.png').verify()"
"$bin/pip" install --quiet mypy
echo 'from labelgrid import Client; reveal_type(Client("").generate([]))' >typed.py
"$bin/mypy" typed.py | grep -F '"service.contract.schemas.Job"' || fail "a type checker does not see the annotations"
url=http://127.0.0.1:$port
start
labelgrid generate "red cube" --url "$url" -o grid.png || fail "nothing was drawn"
"$bin/python" -c "from PIL import Image; Image.open('grid.png').verify()"
end TERM
start
echo '[["red cube", "blue sphere"]]' >lists.json
labelgrid score lists.json --url "$url" --repeats 2 --fail-under accuracy=0.5 || fail "nothing was scored"
end INT
echo "1 passed, 0 failed: $("$bin/python" --version), $(basename "$wheel")"
