# Sourced with the words for run.py: collects the small dataset of Breakout if a run needs it.
commands=$(python benchmark/run.py "$@" --dry-run)  # none if all are finished
if [[ $commands = python* && ! -e data/atari/Breakout-dqn-60k && " $* " != *" --dry-run "* ]]; then
    python benchmark/collect_atari.py --env-id Breakout --num-steps 60000 --replay-start 2000 \
        --epsilon-steps 15000
fi
