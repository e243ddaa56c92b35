#!/usr/bin/env bash
# The five methods on a small local dataset of MsPacman, three seeds, sized for CPU cores.
#   bash benchmark/atari_small.sh --total-updates 3000
# Finished runs are skipped and stopped ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e data/atari/MsPacman-dqn-60k ]; then
    python benchmark/collect_atari.py --env-id MsPacman --num-steps 60000 --replay-start 2000 \
        --epsilon-steps 15000
fi
for seed in 0 1 2; do
    for script in bc_atari crr_atari cql_atari rosmo_atari muzero_unplugged_atari; do
        python $script.py --env-id MsPacman --seed $seed --dataset data/atari/MsPacman-dqn-60k \
            --channels 16 --batch-size 16 --eval-episodes 5 --final-eval-episodes 20 "$@"
    done
done
python benchmark/report.py atari_small "$@"
