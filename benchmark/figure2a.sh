#!/usr/bin/env bash
# Fig. 2(a): shares of the data, on the three tasks.
#   bash benchmark/figure2a.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for percent in 1 10 30 100; do
    for task in catch mountain_car cartpole; do
        for script in rosmo_bsuite muzero_unplugged_bsuite; do
            python $script.py --env-id $task --data-percent $percent --log-every 1000 "$@"
        done
    done
done
python benchmark/report.py figure2a "$@"
