#!/usr/bin/env bash
# The table of docs/results/README.md: PCAE, MAE and no pre-training on Fashion-MNIST, with the same encoder.
#
#   docs/results/fashion.sh target/release/pcae /usr/share/datasets/fashion-mnist runs/fashion [THREADS]
#
# The steps of each method are those that two cores of the machine of the table do in twenty minutes (see there); a part
# that has been done is not done again.
set -euo pipefail
pcae=$1 data=$2 out=$3 threads=${4:-0}
which=${WHICH:---which}
mkdir -p "$out/results"

once() { # NAME COMMAND...: its standard output to results/NAME.json
    local to=$out/results/$1.json
    shift
    [ -s "$to" ] || { "$pcae" "$@" --threads "$threads" --json >"$to.part" && mv "$to.part" "$to"; }
}

pretrain() { # METHOD STEPS
    [ -s "$out/results/pretrain-$1.json" ] && return
    once "pretrain-$1" pretrain --data "$data" --method "$1" --steps "$2" --set eval_every=5 --out "$out/$1"
}

frozen() { # NAME RUN WHICH
    once "knn-$1" knn "$2" "$which" "$3" --data "$data" --k 20
    once "logistic-$1" probe "$2" "$which" "$3" --data "$data"
    for seed in 0 1 2; do
        once "lars-$1-$seed" probe "$2" "$which" "$3" --data "$data" --solver lars --seed $seed
    done
}

tuned() { # NAME WEIGHTS
    for seed in 0 1 2; do
        once "finetune-$1-$seed" finetune --weights "$2" --data "$out/fashion-6000" --epochs 10 --seed $seed \
            --out "$out/finetune-$1-$seed"
    done
}

[ -d "$out/fashion-6000" ] || python3 "$(dirname "$0")/subset.py" "$data" 6000 "$out/fashion-6000"
for method in ${METHODS:-pcae mae}; do
    case $method in pcae) steps=39000 ;; mae) steps=27350 ;; esac
    pretrain $method $steps
    frozen $method "$out/$method" student
    tuned $method "$out/$method"
done
[ -n "${METHODS:-}" ] && [ -z "${REST:-}" ] && exit
for seed in 0 1 2; do
    [ -d "$out/untrained-$seed" ] || "$pcae" pretrain --data "$data" --steps 1 --seed $seed --set eval_every=0 --out "$out/untrained-$seed"
    once "knn-none-$seed" knn "$out/untrained-$seed" "$which" untrained --data "$data" --k 20
    once "lars-none-$seed" probe "$out/untrained-$seed" "$which" untrained --data "$data" --solver lars --seed $seed
done
once "logistic-none" probe "$out/untrained-0" "$which" untrained --data "$data"
tuned none none

# The shape of the paper's Table 5: trained dense or with a drop ratio, evaluated at all of them.
for ratio in 0.1 0.2 0.3 0.4; do
    once "reduced-$ratio" finetune --weights "$out/pcae" --data "$out/fashion-6000" --epochs 10 --drop-ratio $ratio \
        --out "$out/reduced-$ratio"
    once "evaluate-reduced-$ratio" evaluate "$out/reduced-$ratio" --drop-ratio $ratio --criterion mean-similarity,random
done
[ -s "$out/results/bench.json" ] || "$pcae" bench "$out/finetune-pcae-0" --drop-ratio 0,0.1,0.2,0.3,0.4 --batch-size 8 --threads 1 \
    --repeats 15 --json "$out/results/bench.json"
once "evaluate-dense" evaluate "$out/finetune-pcae-0" --drop-ratio 0,0.1,0.2,0.3,0.4 --criterion mean-similarity,random
