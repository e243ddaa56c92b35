#!/usr/bin/env bash
# Table 7: MOReL, COMBO, MuZero Unplugged and ROSMO on MsPacman. COMBO takes MOReL's world models.
#   bash benchmark/table7.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 12 runs of one seed; world models of up to 200,000 updates, then 1,250 updates of MOReL,
# 200,000 of the others (six runs are Table 8's). Disk: 10 GB of data, 20 GB of runs (a checkpoint
# of a world model has 2.4 GB, and two are kept). Extrapolated: at most 30 hours of an H200, without
# evaluations and without the policies of MOReL and COMBO, which are not measured (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py table7 "$@"
python benchmark/report.py table7 "$@"
