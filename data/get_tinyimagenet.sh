#!/bin/sh
# Downloads TinyImageNet-200 (248 MB) and unpacks it as tiny-imagenet-200/ beside this script, or in another folder:
#     sh data/get_tinyimagenet.sh [FOLDER]
# Needs torchvision, in .venv or in $PYTHON (python3). A tiny-imagenet-200.zip that is in the folder already is used if
# its checksum is right. TINYIMAGENET_URL and TINYIMAGENET_MD5 name another source and its checksum.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
case $#:${1:-} in
    0: | 1:[!-]*) ;;
    *) echo "usage: sh data/get_tinyimagenet.sh [FOLDER]" >&2 && exit 2 ;;
esac
python=$here/../.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" - "${1:-$here}" "$here/.." <<'END'
import sys
from pathlib import Path

sys.path[0] = sys.argv[2]  # it is the current folder, which may hold another package `dataset`
try:
    from dataset.tinyimagenet import download

    print(f"{download(Path(sys.argv[1]))} is complete: --dataset tinyimagenet --data_folder {sys.argv[1]}")
except (ImportError, OSError, ValueError) as error:
    hint = "; pip install -r requirements.txt, or let PYTHON name a Python that has it" * isinstance(error, ImportError)
    print(f"get_tinyimagenet.sh: {error}{hint}", file=sys.stderr)
    sys.exit(2)
END
