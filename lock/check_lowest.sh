#!/bin/sh
# Run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest: sh lock/check_lowest.sh, from the
# repository's root. A floor that proves too low is raised in pyproject.toml.
#
# Not lowered are torch and torchvision, gigabytes of CUDA each. Not run are the tests of traces: their extra, `otel`, needs a
# newer FastAPI than the service does, and would hide its floor; and the test of the lock file that needs the extra `dev`.
set -eu
python=.venv-lowest/bin/python
lowest=.venv-lowest/requirements.txt
test -x $python || "${PYTHON:-python3.11}" -m venv .venv-lowest

sh lock/install.sh $python train  # the extra that has both
grep -E '^(torch|torchvision)==' lock/requirements.txt | sed 's/ .*//' >.venv-lowest/torch.txt
$python -m uv --quiet pip compile --python $python --resolution lowest-direct --constraint .venv-lowest/torch.txt \
  --extra test pyproject.toml --no-annotate --output-file $lowest >/dev/null
# What only PyPI's torch needs is there already, if this is PyPI's torch.
grep -vE '^(nvidia|cuda|triton)' $lowest >$lowest.rest
$python -m uv --quiet pip install --python $python --no-deps --requirement $lowest.rest --editable .
$python -m pytest -n auto --dist loadfile --ignore tests/service/telemetry/test_tracing.py \
  --deselect tests/test_lock.py::test_everything_that_is_installed_is_locked "$@"
