#!/usr/bin/env bash
# Fig. 2(c): MuZero Unplugged's simulations N and depth of search, on the three tasks.
#   bash benchmark/figure2c.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for simulations in 2 4 16 32; do
    for depth in "" "--max-depth 2" "--max-depth 1"; do
        for task in catch mountain_car cartpole; do
            python muzero_unplugged_bsuite.py --env-id $task --num-simulations $simulations $depth \
                --log-every 1000 "$@"
        done
    done
done
python benchmark/report.py figure2c "$@"
