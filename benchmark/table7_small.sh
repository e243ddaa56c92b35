#!/usr/bin/env bash
# MOReL, COMBO, MuZero Unplugged and ROSMO on a small local dataset of Breakout, for CPU cores.
#   bash benchmark/table7_small.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
#   bash benchmark/table7_small.sh --world-model benchmark/results/morel_atari/Breakout-dqn-60k-world-model
# Cost: 5 runs of one seed, two of them atari_small's; four minutes of data; 2.3 hours of world model
# on two cores, none with the one above; 2 hours of the policies. Disk: 30 MB of data, 100 MB of runs.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source benchmark/small_data.sh table7_small "$@"
python benchmark/run.py table7_small "$@"
python benchmark/report.py table7_small "$@"
