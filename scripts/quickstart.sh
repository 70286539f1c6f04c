#!/bin/sh
# Trains the table of tables/quick.toml on handwritten digits, which come with scikit-learn, and writes its page. Can be
# interrupted and started again. Needs only Python 3.10 or later with pip.
set -eu
cd "$(dirname "$0")/.."
requirements=requirements.txt
. scripts/setup.sh

"$python" scripts/run_table.py tables/quick.toml --jobs 2
"$python" scripts/report.py save/quick
