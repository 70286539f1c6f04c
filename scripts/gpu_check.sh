#!/bin/sh
# All that needs a GPU, in ten minutes or so (an estimate): the tests for CUDA, the accuracies of a short training beside
# the CPU's, and the benchmark. Tables are left in the folder, to be copied to docs/benchmarks.md.
#     sh scripts/gpu_check.sh [FOLDER]
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
out=${1:-save/gpu_check}

python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "this torch finds no GPU")'
python -m pytest tests/test_engine.py tests/test_benchmark.py -k "cuda or gpu or failed_one" -rs

settings="--dataset digits --epochs 12 --lr_decay_epochs 8,10,11"
python train_teacher.py --model resnet20 $settings --device cuda --output "$out"
for side in "cpu fp32" "cuda fp32" "cuda bf16"; do
    set -- $side
    python train_student.py --path_t "$out"/models/resnet20_*/resnet20_last.pth --model_s resnet8 \
        --distill none kd attention crd --nce_k 512 $settings --device "$1" --precision "$2" --output "$out/$1-$2"
done

python scripts/benchmark.py --all --rounds 2 --output "$out/benchmark"
for side in cpu-fp32 cuda-fp32 cuda-bf16; do
    echo "$side:"
    python scripts/report.py "$out/$side"
done
