#!/usr/bin/env bash
# MOReL and COMBO on a small local dataset of MsPacman, with one world model, sized for a CPU core.
#   bash benchmark/model_based_small.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of both scripts.
# Cost: seven runs of one seed; 2 hours measured on one core of a shared CPU, without the data.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e data/atari/MsPacman-dqn-60k ]; then
    python benchmark/collect_atari.py --env-id MsPacman --num-steps 60000 --replay-start 2000 \
        --epsilon-steps 15000
fi
small="--env-id MsPacman --dataset data/atari/MsPacman-dqn-60k --batch-size 16 --members 2"
small="$small --deter 128 --hidden 128 --latents 16 --classes 16 --depth 12 --head-units 64"
small="$small --eval-episodes 5 --final-eval-episodes 20"
python morel_atari.py $small --model-batch-size 8 --model-length 12 --model-learning-rate 1e-3 \
    --model-updates 2000 --model-eval-every 200 --channels 8 --rollout-length 32 --starts 1 \
    --epochs 2 --learning-rate 1e-3 --total-updates 200 --anneal-updates 200 --halt-batches 8 \
    --run-dir runs/morel_atari/MsPacman-dqn-60k "$@"
model="--world-model runs/morel_atari/MsPacman-dqn-60k-world-model"
cloned="$small $model --channels 8 --rollout-length 32 --starts 1 --epochs 2 --halt-batches 8"
cloned="$cloned --anneal-updates 100 --bc-updates 5000 --bc-batch-size 64"
python morel_atari.py $cloned --total-updates 100 --eval-every 10 \
    --run-dir runs/morel_atari/MsPacman-dqn-60k-cloned "$@"
python morel_atari.py $cloned --total-updates 1 --eval-every 1 --log-every 1 --checkpoint-every 1 \
    --learning-rate 1e-12 --run-dir runs/morel_atari/MsPacman-dqn-60k-clone-alone "$@"
combo="$small $model --channels 16 --rollout-starts 64 --rollout-epsilon 1"
combo="$combo --target-update-every 500"
python combo_atari.py $combo --total-updates 30000 \
    --run-dir runs/combo_atari/MsPacman-dqn-60k "$@"
for push_up in mix real; do
    python combo_atari.py $combo --total-updates 2000 --push-up $push_up \
        --run-dir runs/combo_atari/MsPacman-dqn-60k-push-up-$push_up "$@"
done
