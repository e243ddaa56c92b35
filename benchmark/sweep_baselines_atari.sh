#!/usr/bin/env bash
# The open values of CRR and CQL, compared on a small local dataset of MsPacman.
#   bash benchmark/sweep_baselines_atari.sh --total-updates 5000
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e data/atari/MsPacman-dqn-60k ]; then
    python benchmark/collect_atari.py --env-id MsPacman --num-steps 60000 --replay-start 2000 \
        --epsilon-steps 15000
fi
small="--env-id MsPacman --dataset data/atari/MsPacman-dqn-60k --channels 16 --batch-size 16"
small="$small --eval-episodes 5 --final-eval-episodes 20"
for beta in 0.1 0.3 1; do
    python crr_atari.py $small --beta $beta "$@"
done
python crr_atari.py $small --weight binary "$@"
for alpha in 0.1 1 4; do
    python cql_atari.py $small --cql-alpha $alpha "$@"
done
python benchmark/report.py sweep_crr_atari sweep_crr_weight_atari sweep_cql_atari "$@"
