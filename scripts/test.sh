#!/bin/sh
# Passes the tests, from nothing but Python 3.10 and pip. Arguments go to pytest: sh scripts/test.sh -m "not slow"
set -eu
cd "$(dirname "$0")/.."
requirements=requirements-dev.txt
. scripts/setup.sh
exec "$python" -m pytest -n 2 "$@"
