#!/usr/bin/env bash
# Table 2: BC, CRR, CQL, MuZero Unplugged and ROSMO on the three tasks.
#   bash benchmark/table2.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for task in catch mountain_car cartpole; do
    for script in bc_bsuite crr_bsuite cql_bsuite rosmo_bsuite muzero_unplugged_bsuite; do
        python $script.py --env-id $task --log-every 1000 "$@"
    done
done
python benchmark/report.py table2 "$@"
