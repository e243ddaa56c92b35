#!/usr/bin/env bash
# The open values of CRR and CQL, compared on catch.
#   bash benchmark/sweep_baselines.sh --total-updates 20000
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for beta in 0.1 0.3 1 3; do
    python crr_bsuite.py --env-id catch --beta $beta --log-every 1000 "$@"
done
python crr_bsuite.py --env-id catch --beta 1 --weight binary --log-every 1000 "$@"
for rate in 7e-4 5e-5; do
    for alpha in 0.01 0.05 0.1 0.5 1 4; do
        python cql_bsuite.py --env-id catch --cql-alpha $alpha --learning-rate $rate \
            --log-every 1000 "$@"
    done
done
python benchmark/report.py sweep_crr sweep_crr_weight sweep_cql "$@"
