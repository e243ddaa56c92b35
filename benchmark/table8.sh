#!/usr/bin/env bash
# Table 8: BC, CRR, CQL, MuZero Unplugged and ROSMO on 12 Atari games. Fig. 3 and 6 draw these runs.
#   bash benchmark/table8.sh [--env-ids Pong Breakout] [--workers 8]
#   bash benchmark/table8.sh --launcher slurm --slurm partition=gpu time=1440
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 180 runs of one seed, 200,000 updates. Not measured here; extrapolated from the paper's
# footnote 3: 16 days of a V100 for the five methods on a game with one seed, 570 days in all; from
# docs/gpu.md: 12 days of an H200, without evaluations.
# Disk: 120 GB for RL Unplugged's run 1 of the games, 20 GB for the runs.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py table8 "$@"
python benchmark/report.py table8 "$@"
