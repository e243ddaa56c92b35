#!/usr/bin/env bash
# Fig. 2(b): widths of the dynamics function at 10% of the data, on the three tasks.
#   bash benchmark/figure2b.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for width in 1024 32 256 128 512; do
    for task in catch mountain_car cartpole; do
        for script in rosmo_bsuite muzero_unplugged_bsuite; do
            python $script.py --env-id $task --data-percent 10 --dynamics-hidden $width \
                --log-every 1000 "$@"
        done
    done
done
python benchmark/report.py figure2b "$@"
