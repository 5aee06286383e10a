#!/bin/sh
# The runs behind README.md's tables and all figures of img/, from nothing. Runs that exist are not repeated, so that it may be
# stopped and started. README's had one core each: REPRODUCE="taskset -c 0" sh img/reproduce.sh
set -e
cd "$(dirname "$0")/.."

run() {    # run NAME FLAGS: train, test and draw, or go on where it was stopped
    folder=run/table/$1; shift
    if [ -e "$folder/results.json" ]; then return; fi
    if [ -e "$folder/checkpoint.npz" ]; then set -- --resume; fi
    $REPRODUCE python train.py --run_dir "$folder" "$@"
}

for seed in 0 1 2; do
    run pcm$seed --seed $seed
    run perf$seed --perf --seed $seed
    run wide$seed --n_h1 128 --gain_out 0.5 --tau_out 0.001 --twait 150 --max_age 100 --batch_train 128 --n_iter 1500 --seed $seed
    run four$seed --n_inner 4 --tau_out 0.001 --twait 150 --max_age 100 --seed $seed
    run best$seed --n_inner 4 --n_bits 3 --n_h1 96 --gain_out 0.45 --tau_out 0.001 --twait 150 --max_age 100 \
        --batch_train 128 --n_iter 1500 --seed $seed
done
run perf50k --n_iter 50000 --perf
run pcm50k --n_iter 50000
$REPRODUCE python img/lifelong.py run/table/pcm50k
for study in limits steps updates bits cost; do $REPRODUCE python img/studies.py $study --n_iter 800; done
$REPRODUCE python analog.py
$REPRODUCE python network.py
for folder in perf50k pcm50k; do    # the figures of these two are the README's
    $REPRODUCE python train.py --resume --run_dir run/table/$folder
done
