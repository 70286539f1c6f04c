#!/bin/sh
# The main job on embedded data: a teacher, a student alone, and students distilled, on handwritten digits.
# Needs nothing but Python 3.10 and pip.
set -eu
cd "$(dirname "$0")/.."
requirements=requirements.txt
. scripts/setup.sh

out=save/quickstart_$(date +%Y%m%d_%H%M%S)
run() {
    echo
    echo "+ $*"
    "$@"
}
set_up="--dataset digits --epochs 16 --lr_decay_epochs 10,13,15 --output $out"
run "$python" train_teacher.py --model resnet20 $set_up
run "$python" train_student.py --path_t "$out"/models/resnet20_*/resnet20_last.pth \
    --model_s resnet8 --distill none kd icd crd --nce_k 512 $set_up
run "$python" scripts/report.py "$out"
