#!/bin/sh
# One column of the published CIFAR-100 table: resnet32x4 -> resnet8x4 by every method, with its published weights.
# The weights are the defaults, too: one call with all names does the same, with one forward pass of the teacher.
#     sh scripts/run_cifar_distill.sh [TEACHER] [TRIAL]
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
teacher=${1:-save/models/resnet32x4_vanilla/ckpt_epoch_240.pth}
trial=${2:-1}

python train_student.py --path_t "$teacher" --distill kd --model_s resnet8x4 -r 0.1 -a 0.9 -b 0 --trial "$trial"
python train_student.py --path_t "$teacher" --distill hint --model_s resnet8x4 -r 1 -a 0 -b 100 --trial "$trial"
python train_student.py --path_t "$teacher" --distill attention --model_s resnet8x4 -r 1 -a 0 -b 1000 --trial "$trial"
python train_student.py --path_t "$teacher" --distill similarity --model_s resnet8x4 -r 1 -a 0 -b 3000 --trial "$trial"
python train_student.py --path_t "$teacher" --distill correlation --model_s resnet8x4 -r 1 -a 0 -b 0.02 --trial "$trial"
python train_student.py --path_t "$teacher" --distill vid --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill rkd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill pkt --model_s resnet8x4 -r 1 -a 0 -b 30000 --trial "$trial"
python train_student.py --path_t "$teacher" --distill abound --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill factor --model_s resnet8x4 -r 1 -a 0 -b 200 --trial "$trial"
python train_student.py --path_t "$teacher" --distill fsp --model_s resnet8x4 -r 1 -a 0 -b 50 --trial "$trial"
python train_student.py --path_t "$teacher" --distill nst --model_s resnet8x4 -r 1 -a 0 -b 50 --trial "$trial"
python train_student.py --path_t "$teacher" --distill crd --model_s resnet8x4 -r 1 -a 0 -b 0.8 --trial "$trial"
python train_student.py --path_t "$teacher" --distill rrd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill icd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill dkd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill reviewkd --model_s resnet8x4 -r 1 -a 0 -b 5 --trial "$trial"
python train_student.py --path_t "$teacher" --distill simkd --model_s resnet8x4 -r 0 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill dist --model_s resnet8x4 -r 1 -a 0 -b 2 --trial "$trial"
python train_student.py --path_t "$teacher" --distill ttm --model_s resnet8x4 -r 1 -a 0 -b 45 --trial "$trial"
python train_student.py --path_t "$teacher" --distill wttm --model_s resnet8x4 -r 1 -a 0 -b 4 --trial "$trial"
python train_student.py --path_t "$teacher" --distill itrd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill rld --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill srrl --model_s resnet8x4 -r 1 -a 1 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill nkd --model_s resnet8x4 -r 1 -a 0 -b 1 --trial "$trial"

# with KD
python train_student.py --path_t "$teacher" --distill crd --model_s resnet8x4 -r 1 -a 1 -b 0.8 --trial "$trial"
python train_student.py --path_t "$teacher" --distill rrd --model_s resnet8x4 -r 1 -a 1 -b 1 --trial "$trial"
python train_student.py --path_t "$teacher" --distill icd --model_s resnet8x4 -r 1 -a 1 -b 1 --trial "$trial"

# with standardised logits (weights and temperatures of the pair are the defaults), and the terms of two methods
python train_student.py --path_t "$teacher" --distill kd dkd rld --model_s resnet8x4 --logit_stand --trial "$trial"
python train_student.py --path_t "$teacher" --distill crd+wttm itrd+wttm --model_s resnet8x4 --trial "$trial"
