"""What the five BSuite scripts have in common: evaluation, batches, target networks, `main`."""

import dataclasses
import importlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import collect_bsuite
import rosmo_bsuite as rosmo
from test_runs_bsuite import SCRIPTS, TINY

pytestmark = pytest.mark.usefixtures("hurry")
SCRIPTS = [name.removesuffix(".py") for name in SCRIPTS]


def test_evaluation_shows_each_observation_and_draws_noise_at_its_rate():
    def follow(boards, t):  # [1, E, 10, 5], the paddle in the last row
        ball, paddle = boards[..., :-1, :].any(-2).argmax(-1), boards[..., -1, :].argmax(-1)
        return 1 + np.sign(ball - paddle)

    play = partial(rosmo.evaluate, follow, "catch", [0, 1], 0, 50)
    assert (play(0.0) == 1).all()
    assert play(1.0).mean() < 0 < play(0.25).mean() < 1


def test_scores_are_normalised_with_table_6():
    assert rosmo.REFERENCE_RETURNS == collect_bsuite.PAPER_TABLE6
    for env_id, (random, online) in rosmo.REFERENCE_RETURNS.items():
        assert rosmo.normalized_score(env_id, random) == 0
        assert rosmo.normalized_score(env_id, online) == 1
    assert rosmo.normalized_score("catch", 0.17) == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_update_draws_another_batch_and_some_copy_the_target(name, catch_dataset):
    script = importlib.import_module(name)
    args = dataclasses.replace(script.Args(), num_seeds=1, batch_size=16, dataset=catch_dataset)
    if name != "bc_bsuite":
        args = dataclasses.replace(args, target_update_every=3)
    steps, _ = script.load_dataset(args)
    network = script.make_network(3, args)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(script.AxisType.Auto,))
    starts, num_starts = script.window_starts(steps.is_last, 100.0, [0])
    init = jax.jit(script.init_state, static_argnums=(1, 3))
    first = init(jax.random.key(0), network, steps.observation[0], args)
    first, key = jax.tree.map(lambda x: x[None], first), jax.random.key(1)[None]
    train = script.make_train(network, mesh, args)
    data = key, steps, starts, num_starts

    states = [train(1, first._replace(step=first.step + i), *data) for i in range(4)]
    norms = [float(metrics["charts/grad_norm"][0, 0]) for _, metrics in states]
    assert len(set(norms)) == 4

    state, copied = first, []
    for _ in range(4):
        state, _ = train(1, state, *data)
        if name != "bc_bsuite":
            same = jax.tree.map(lambda a, b: (a == b).all(), state.params, state.target_params)
            copied.append(bool(jax.tree.all(same)))
    # The first learning rate of the warm-up is zero.
    assert copied == ([] if name == "bc_bsuite" else [True, False, True, False])


@pytest.mark.parametrize("name", SCRIPTS)
def test_final_evaluations_sample_then_take_the_best_and_need_no_noise(
    name, catch_dataset, cache_dir, tmp_path, monkeypatch
):
    script, noises = importlib.import_module(name), []

    def act(greedy, network, args, params, observation, key):
        return jnp.full(len(observation), int(greedy))

    def evaluate(policy, env_id, seeds, update, num_episodes, noise):
        noises.append(noise)
        return np.array(policy(np.zeros((len(seeds), num_episodes, 10, 5), np.float32), 0))

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(script, "act", act)
    monkeypatch.setattr(script, "evaluate", evaluate)
    options = [*TINY, "--dataset", catch_dataset, "--run-dir", tmp_path / "run", "--noise", 0.5]
    options += ["--total-updates", 20, "--checkpoint-every", 20, "--eval-greedy"]
    script.main(tyro.cli(script.Args, args=[str(option) for option in options]))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["eval/return_mean"] for x in lines if "eval/returns" in x] == [1, 1]
    assert [x["final/return_mean"] for x in lines if "final/returns" in x] == [0, 0]
    assert [x["final/return_mean_greedy"] for x in lines if "final/returns" in x] == [1, 1]
    assert noises == [0, 0, 0]
