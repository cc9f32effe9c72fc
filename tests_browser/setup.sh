#!/bin/sh
# A Chromium for the tests: the system's if there is one, else Playwright's own, else Debian's.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
"$BIN/python" -m playwright install chromium && exit 0
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium
