#!/bin/sh
# Trains a teacher, a student baseline and three distilled students on handwritten digits, which come with scikit-learn.
# Needs only Python 3.10 or later with pip.
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
settings="--dataset digits --epochs 16 --lr_decay_epochs 10,13,15 --output $out"
run "$python" train_teacher.py --model resnet20 $settings
run "$python" train_student.py --path_t "$out"/models/resnet20_*/resnet20_last.pth \
    --model_s resnet8 --distill none kd icd crd --nce_k 512 $settings
run "$python" scripts/report.py "$out"
