#!/usr/bin/env bash
# Table 1: catch, with data of environments of noise 0, 0.1, 0.3 and 0.5.
#   bash benchmark/table1.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on. Needs about 2.5 CPU hours for 50,000 updates.
set -euo pipefail
cd "$(dirname "$0")/.."
for noise in 0.5 0.3 0.1 0; do
    for script in rosmo_bsuite muzero_unplugged_bsuite; do
        python $script.py --env-id catch --noise $noise --log-every 1000 "$@"
    done
done
python benchmark/report.py table1 "$@"
