#!/bin/sh
# Runs the tests; needs only Python 3.10 or later with pip. Arguments go to pytest: sh scripts/test.sh -m "not slow"
set -eu
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
. scripts/setup.sh
exec "$python" -m pytest -n 2 "$@"
