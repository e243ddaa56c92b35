#!/usr/bin/env bash
# MOReL with other thresholds and penalties on a small local dataset of Breakout, for CPU cores.
#   bash benchmark/morel_small.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
#   bash benchmark/morel_small.sh --world-model benchmark/results/morel_atari/Breakout-dqn-60k-world-model
# Cost: 5 runs of one seed, one of them table7_small's, as is the world model (2.3 hours on two
# cores, none with the one above); four minutes of data; 15 minutes on two cores for each of the
# others. Disk: 30 MB of data, 100 MB of runs.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source benchmark/small_data.sh morel_small "$@"
python benchmark/run.py morel_small "$@"
python benchmark/report.py morel_small "$@"
