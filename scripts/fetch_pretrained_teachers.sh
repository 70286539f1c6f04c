#!/bin/sh
# Downloads the published CIFAR-100 teachers, all six or by name, to save/models/<name>_vanilla/ckpt_epoch_240.pth.
#     sh scripts/fetch_pretrained_teachers.sh [NAME ...] [--evaluate]
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
exec python scripts/fetch_teachers.py "$@"
