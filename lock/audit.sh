#!/bin/sh
# Look up the locked versions in PyPI's database of vulnerabilities: sh lock/audit.sh PYTHON, from the repository's root.
# Exits with 1 where there are any, and with 3 and one line where the database does not answer.
set -u
report=$("$1" -m pip_audit --strict --require-hashes --disable-pip --requirement lock/requirements.txt --progress-spinner off 2>&1)
code=$?
case "$code $report" in
  0*) echo "$report" ;;
  *"Found "*) echo "$report"; exit 1 ;;
  *) echo "audit: nothing was checked, since the database gave no answer: $(echo "$report" | tail -n 1)" >&2; exit 3 ;;
esac
