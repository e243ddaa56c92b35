#!/usr/bin/env bash
# The five methods on a small local dataset of MsPacman, three seeds, sized for CPU cores.
#   bash benchmark/atari_small.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 15 runs of 3,000 updates; 4 minutes of data, then 3.3 hours measured on one core of a shared
# CPU. Disk: 30 MB of data, 200 MB of runs.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e data/atari/MsPacman-dqn-60k ]; then
    python benchmark/collect_atari.py --env-id MsPacman --num-steps 60000 --replay-start 2000 \
        --epsilon-steps 15000
fi
python benchmark/run.py atari_small "$@"
python benchmark/report.py atari_small "$@"
