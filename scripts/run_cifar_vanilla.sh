#!/bin/sh
# The six teachers of the published CIFAR-100 table, and the students alone.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

# teachers
python train_teacher.py --model wrn_40_2
python train_teacher.py --model resnet56
python train_teacher.py --model resnet110
python train_teacher.py --model resnet32x4
python train_teacher.py --model vgg13
python train_teacher.py --model ResNet50

# students without a teacher
python train_student.py --distill none --model_s wrn_16_2 --trial 1
python train_student.py --distill none --model_s wrn_40_1 --trial 1
python train_student.py --distill none --model_s resnet20 --trial 1
python train_student.py --distill none --model_s resnet32 --trial 1
python train_student.py --distill none --model_s resnet8x4 --trial 1
python train_student.py --distill none --model_s vgg8 --trial 1
python train_student.py --distill none --model_s MobileNetV2 --trial 1
python train_student.py --distill none --model_s ShuffleV1 --trial 1
python train_student.py --distill none --model_s ShuffleV2 --trial 1
