"""Policy of morel_atari.py: discrepancy, pessimistic MDP, PPO, runs."""

import dataclasses
import os
import signal
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from helpers import metrics

import morel_atari as morel

pytestmark = pytest.mark.usefixtures("hurry")
TINY = "--env-id Pong --members 3 --deter 8 --hidden 8 --latents 3 --classes 3 --depth 1"
TINY += " --head-units 8 --rollout-length 4 --minibatches 2 --epochs 2 --horizon 3 --warm-up 5"
ARGS = tyro.cli(morel.Args, args=TINY.split())
NETWORK = morel.make_world_model(6, ARGS)
STEP = jax.jit(partial(morel.imagined_step, NETWORK, args=ARGS))
START = jax.jit(partial(morel.start_episodes, NETWORK))
OBSERVE = jax.jit(partial(morel.observe, NETWORK))
HALTING = ["charts/threshold", "charts/halt_rate_logged", "charts/halt_rate_random"]
HURRY = {"xla_backend_optimization_level": 0}  # quick to compile


class Linear(nn.Module):
    """A policy that sees the mean intensity of each of its four frames."""

    @nn.compact
    def __call__(self, observation):
        x = jnp.mean(observation / 255, axis=(-3, -2))
        return nn.Dense(3)(x), nn.Dense(1)(x)[..., 0]


@pytest.fixture(scope="module")
def members():
    members = morel.init_members(jax.random.key(0), NETWORK, 3)
    return jax.tree.map(lambda *x: np.stack(x), *members)


@pytest.fixture(scope="module")
def toy_store(toy_path):
    return morel.open_store(dataclasses.replace(ARGS, dataset=toy_path))


@pytest.fixture(scope="module")
def env(members):
    """Four episodes after four frames, of which the last game began with the third."""
    rng = np.random.default_rng(0)
    is_first = np.zeros((4, 5), bool)
    is_first[3, 3] = True
    windows = morel.Windows(
        rng.integers(0, 256, (4, 5, 84, 84), dtype=np.uint8),
        np.where(is_first, -1, rng.integers(0, 6, (4, 5))).astype(np.int32),
        *(np.zeros((4, 5), np.float32), is_first, np.zeros((4, 5), bool)),
    )
    env = jax.device_get(START(members, windows, jnp.array([0, 1, 2, 1])))
    for b, t in np.ndindex(4, 4):
        expected = windows.frame[b, t + 1] * (b != 3 or t >= 2)
        np.testing.assert_array_equal(env.frames[b, ..., t], expected)
    for i in range(3):  # every member has filtered all of the frames
        state = jax.device_get(OBSERVE(member_of(members, i), windows)[0])
        last = jax.tree.map(lambda x: x[:, -1], state)
        np.testing.assert_allclose(env.state.deter[:, i], last.deter, atol=1e-5)
        np.testing.assert_array_equal(env.state.latent[:, i], last.latent)
    return env


def member_of(tree, i: int):
    """The leaves' i-th elements."""
    return jax.tree.map(lambda x: x[i], tree)


def naive_discrepancy(image, reward, block: int) -> float:
    """Images [E, 84, 84], rewards [E]."""
    distances = []
    for i in range(len(reward)):
        for j in range(i):
            for row in range(0, 84, block):
                for column in range(0, 84, block):
                    x, y = (
                        np.append(
                            image[m, row : row + block, column : column + block].ravel() / block,
                            reward[m],
                        )
                        for m in (i, j)
                    )
                    distances.append(np.linalg.norm(x - y))
    return max(distances)


@pytest.mark.parametrize("block", [84, 7])
def test_discrepancy_against_a_naive_loop(block):
    rng = np.random.default_rng(0)
    image, reward = rng.normal(size=(3, 4, 84, 84)), rng.normal(size=(3, 4)) / 5
    image[1:, 0, :7, :7] += 3  # a difference in one block
    expected = [naive_discrepancy(image[:, b], reward[:, b], block) for b in range(4)]
    np.testing.assert_allclose(morel.discrepancy(image, reward, block), expected, rtol=1e-5)
    same = np.repeat(image[:1], 3, axis=0), np.repeat(reward[:1], 3, axis=0)
    assert (morel.discrepancy(*same, block) == 0).all()
    assert (morel.discrepancy(image, same[1], block) > 0).all()
    assert (morel.discrepancy(same[0], reward, block) > 0).all()


def test_identical_members_have_no_discrepancy_and_different_ones_do(members, env):
    action = jnp.arange(4)
    assert (STEP(members, env, action, jnp.inf)[1].discrepancy > 1e-4).all()
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 3, axis=0), members)
    state = jax.tree.map(lambda x: jnp.repeat(x[:, :1], 3, axis=1), env.state)
    outcome = STEP(same, env._replace(state=state), action, jnp.inf)[1]
    np.testing.assert_allclose(outcome.discrepancy, 0, atol=1e-6)


@jax.jit(compiler_options=HURRY)
def alone(params, state, action, frame):
    """One member of one episode, with the scalar inputs of a step: it predicts, and it filters."""
    predicted = morel.imagine(NETWORK, params, state, action)
    embedding = NETWORK.apply(params, frame, method="encode")
    logits = NETWORK.apply(params, predicted.deter, embedding, method="posterior")
    filtered = morel.State(predicted.deter, morel.draw_latent(logits))
    return predicted, NETWORK.apply(params, predicted, method="decode"), filtered


def test_the_episodes_member_decides_and_the_others_filter_its_frame(members, env):
    action = jnp.array([5, 0, 3, 2])
    after, outcome = STEP(members, env, action, jnp.inf)
    np.testing.assert_array_equal(after.member, env.member)
    np.testing.assert_array_equal(after.frames[..., :3], env.frames[..., 1:])
    np.testing.assert_allclose(after.reward_sum, outcome.reward, atol=1e-6)
    assert after.steps.tolist() == [1] * 4
    assert not outcome.halted.any()
    changed = 0
    for b in range(4):
        for i in range(3):
            params, before = member_of(members, i), member_of(member_of(env.state, b), i)
            state, decoded, filtered = alone(params, before, action[b], after.frames[b, ..., 3])
            if i == env.member[b]:
                frame = np.asarray(morel.to_frame(decoded.image), int)
                assert np.abs(after.frames[b, ..., 3].astype(int) - frame).max() <= 1  # rounding
                assert outcome.reward[b] == pytest.approx(float(decoded.reward), abs=1e-5)
                assert outcome.terminated[b] == (decoded.terminal_logit > 0)
            else:
                changed += int((filtered.latent != state.latent).sum())
                state = filtered
            np.testing.assert_allclose(after.state.deter[b, i], state.deter, atol=1e-5)
            np.testing.assert_array_equal(after.state.latent[b, i], state.latent)
    assert changed  # what a member would predict is not what it sees


def test_a_halt_costs_the_penalty_and_terminates_and_the_horizon_only_ends(members, env):
    params = members["params"] | {  # p(terminal) < 1/2
        "terminal_head": jax.tree.map(lambda x: -jnp.abs(x), members["params"]["terminal_head"])
    }
    params["terminal_head"]["Dense_0"]["bias"] -= 10
    env = env._replace(steps=jnp.array([0, 2, 2, 0]), reward_sum=jnp.ones(4))
    action = jnp.zeros(4, jnp.int32)
    after, free = STEP({"params": params}, env, action, jnp.inf)
    assert free.terminated.tolist() == free.halted.tolist() == [False] * 4
    assert free.ended.tolist() == [False, True, True, False]
    np.testing.assert_allclose(after.reward_sum, 1 + free.reward, rtol=1e-6)
    threshold = np.sort(free.discrepancy)[1]
    after, outcome = STEP({"params": params}, env, action, threshold)
    halted = np.asarray(free.discrepancy) > threshold
    assert halted.sum() == 2
    np.testing.assert_array_equal(outcome.halted, halted)
    np.testing.assert_array_equal(outcome.terminated, halted)
    np.testing.assert_array_equal(outcome.ended, halted | free.ended)
    np.testing.assert_array_equal(outcome.reward, np.where(halted, -10, free.reward))
    np.testing.assert_allclose(after.reward_sum, 1 + outcome.reward, rtol=1e-6)


def random_steps(batch_size: int = 3, length: int = 20) -> morel.Transitions:
    rng = np.random.default_rng(0)
    shape = (batch_size, length)
    value, reward, next_value = rng.normal(size=(3, *shape))
    terminated = rng.random(shape) < 0.15
    ended = terminated | (rng.random(shape) < 0.15)
    next_value[:, :-1] = np.where(ended, next_value, np.roll(value, -1, 1))[:, :-1]
    frames = rng.integers(0, 256, (*shape, 84, 84, 4), dtype=np.uint8)
    action = rng.integers(0, 3, shape)
    return morel.Transitions(
        *(frames, action, np.log(rng.random(shape)), value, reward, terminated, ended, next_value)
    )


def test_advantages_against_a_naive_sum():
    steps, gamma, decay = random_steps(), ARGS.discount, ARGS.discount * ARGS.gae_lambda
    result = morel.advantages(jax.tree.map(jnp.asarray, steps), ARGS)
    for b, t in np.ndindex(*steps.reward.shape):
        expected = 0.0
        for k in range(t, steps.reward.shape[1]):
            bootstrap = 0 if steps.terminated[b, k] else gamma * steps.next_value[b, k]
            delta = steps.reward[b, k] + bootstrap - steps.value[b, k]
            expected += decay ** (k - t) * delta
            if steps.ended[b, k]:
                break
        assert result[b, t] == pytest.approx(expected, abs=1e-4)
        if steps.terminated[b, t]:  # not bootstrapped
            assert result[b, t] == pytest.approx(steps.reward[b, t] - steps.value[b, t], abs=1e-5)
    cut_off = steps.ended & ~steps.terminated
    delta = steps.reward + gamma * steps.next_value - steps.value
    assert cut_off.any()
    assert steps.terminated.any()
    np.testing.assert_allclose(result[cut_off], delta[cut_off], atol=1e-5)


def counting_step(lengths):
    """Episodes b of lengths[b] steps; the frames after step t are t, the reward is t."""

    def step(env, action):
        steps = env.steps + 1
        frames = jnp.broadcast_to(steps[:, None, None, None], env.frames.shape).astype(jnp.uint8)
        reward, ended = steps.astype(jnp.float32), steps >= lengths
        env = env._replace(frames=frames, steps=steps, reward_sum=env.reward_sum + reward)
        halted = ended & (jnp.arange(len(steps)) == 0)
        return env, morel.Outcome(reward, halted, halted, ended, reward)

    return step


def empty_episodes(*shape: int, frame: int = 0) -> morel.Imagined:
    zeros = jnp.zeros(shape, jnp.int32)
    frames = jnp.full((*shape, 2, 2, 4), frame, jnp.uint8)  # no network looks at them
    return morel.Imagined(zeros, frames, zeros, zeros, jnp.zeros(shape))


def test_a_rollout_goes_through_the_starts_and_bootstraps_with_the_true_next_frame():
    args = dataclasses.replace(ARGS, rollout_length=9)
    policy = SimpleNamespace(  # the value is the frame's intensity
        apply=lambda params, frames: (
            params * frames[..., 0, 0, :3].astype(jnp.float32) / 50,
            frames[..., 0, 0, 0].astype(jnp.float32),
        )
    )
    starts = empty_episodes(2, 2)
    numbers = jnp.array([[100, 110], [120, 130]])
    frames = jnp.broadcast_to(numbers[..., None, None, None], starts.frames.shape)
    starts = starts._replace(frames=frames.astype(jnp.uint8), member=numbers)
    params = jnp.array([1.0, 2.0, 3.0])
    env, steps, metrics = morel.rollout(
        *(params, empty_episodes(2), starts, jax.random.key(0)),
        *(counting_step(jnp.array([2, 5])), policy, args),
    )
    before = [[0, 1, 100, 1, 110, 1, 100, 1, 110], [0, 1, 2, 3, 4, 120, 1, 2, 3]]
    after = [[1, 2, 1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4, 5, 1, 2, 3, 4]]
    np.testing.assert_array_equal(steps.frames[..., 0, 0, 0], before)
    np.testing.assert_array_equal(steps.value, before)
    np.testing.assert_array_equal(steps.reward, after)
    np.testing.assert_array_equal(steps.next_value, after)
    np.testing.assert_array_equal(
        np.argwhere(steps.ended), [[0, 1], [0, 3], [0, 5], [0, 7], [1, 4]]
    )
    np.testing.assert_array_equal(steps.terminated[0], steps.ended[0])
    assert not steps.terminated[1].any()
    logits = params * np.array(before)[..., None] / 50
    expected = np.take_along_axis(jax.nn.log_softmax(logits), np.array(steps.action)[..., None], -1)
    np.testing.assert_allclose(steps.log_prob, expected[..., 0], atol=1e-5)
    assert env.member.tolist() == [110, 120]  # an episode keeps its start's
    assert env.steps.tolist() == [1, 4]
    ended = metrics.pop("ended")
    sums = {"halt_rate": 4, "episode_length": 13, "episode_return": 4 * 3 + 15}
    assert ended == pytest.approx({f"charts/{k}": v for k, v in sums.items()})
    expected = {"charts/episodes": 5, "charts/discrepancy": np.mean(after)}
    assert metrics == pytest.approx(expected)
    sums = {"losses/total": 6.0, "ended": ended} | metrics
    means = morel.mean_ppo_metrics(sums, 2)
    assert means["charts/episode_length"] == pytest.approx(13 / 5)
    assert means["charts/episodes"] == 2.5
    assert means["losses/total"] == 3
    none = morel.mean_ppo_metrics(sums | {"charts/episodes": 0.0}, 2)
    assert set(none) == {"losses/total", "charts/episodes", "charts/discrepancy"}


def test_every_imagined_step_draws_an_action_of_its_own():
    def apply(params, frames):
        return jnp.zeros((*frames.shape[:-3], 3)), jnp.zeros(frames.shape[:-3])

    def step(env, action):
        no = action < 0
        return env, morel.Outcome(jnp.zeros(4), no, no, no, jnp.zeros(4))

    args, policy = dataclasses.replace(ARGS, rollout_length=30), SimpleNamespace(apply=apply)
    inputs = None, empty_episodes(4), empty_episodes(4, 2), jax.random.key(0)
    _, steps, _ = morel.rollout(*inputs, step, policy, args)
    assert [len(set(row)) for row in steps.action.tolist()] == [3] * 4


def test_the_loss_of_ppo_against_a_naive_loop():
    steps, policy = random_steps(), Linear()
    rng = np.random.default_rng(1)
    advantage = rng.normal(2, 3, size=steps.reward.shape)
    params = policy.init(jax.random.key(0), steps.frames)
    logits, value = map(np.array, policy.apply(params, steps.frames))
    probs = np.array(jax.nn.softmax(logits))
    chosen = np.take_along_axis(probs, steps.action[..., None], -1)[..., 0]
    steps = steps._replace(log_prob=np.log(chosen) + rng.normal(0, 0.15, chosen.shape))
    total, metrics = morel.ppo_loss(params, steps, advantage, policy, ARGS)
    sums = dict.fromkeys(("policy", "value", "entropy", "kl", "clipped"), 0.0)
    normalised = (advantage - advantage.mean()) / advantage.std()
    for index in np.ndindex(*advantage.shape):
        ratio = chosen[index] / np.exp(steps.log_prob[index])
        worst = min(ratio * normalised[index], np.clip(ratio, 0.9, 1.1) * normalised[index])
        sums["policy"] -= worst
        sums["value"] += (value[index] - steps.value[index] - advantage[index]) ** 2 / 2
        sums["entropy"] -= (probs[index] * np.log(probs[index])).sum()
        sums["kl"] += ratio - 1 - np.log(ratio)
        sums["clipped"] += abs(ratio - 1) > 0.1
    means = {name: x / advantage.size for name, x in sums.items()}
    assert 0.1 < means["clipped"] < 0.9
    expected = means["policy"] + 0.5 * means["value"] - 0.01 * means["entropy"]
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert metrics == pytest.approx(
        {
            "losses/policy": means["policy"],
            "losses/value": means["value"],
            "losses/total": expected,
            "charts/entropy": means["entropy"],
            "charts/approx_kl": means["kl"],
            "charts/clip_fraction": means["clipped"],
        },
        rel=1e-3,
        abs=1e-5,
    )


def test_the_gradient_reaches_every_parameter_of_the_policy():
    policy = morel.PolicyNetwork(3, 2, jnp.float32)
    steps = jax.tree.map(lambda x: jnp.asarray(x[:, :2]), random_steps())
    init = jax.jit(policy.init_with_output, compiler_options=HURRY)
    (logits, value), params = init(jax.random.key(0), steps.frames)
    assert logits.shape == (3, 2, 3)
    assert not logits.any()  # uniform at first
    assert value.shape == (3, 2)
    params = helpers.with_noise(params, 1)
    loss = partial(morel.ppo_loss, policy=policy, args=dataclasses.replace(ARGS, clip_ratio=100.0))
    gradient = jax.jit(jax.grad(loss, has_aux=True), compiler_options=HURRY)
    gradient, _ = gradient(params, steps, steps.reward)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_ppo_learns_which_action_a_frame_asks_for():
    """One step per episode; the reward is 1 for the action that the frame's intensity tells."""
    args = dataclasses.replace(ARGS, rollout_length=16, learning_rate=0.1, anneal_updates=40)
    policy, optimizer = Linear(), morel.make_optimizer(args)

    def step(env, action):
        reward = (action == env.frames[:, 0, 0, 0] // 100).astype(jnp.float32)
        ended = jnp.ones(8, bool)
        return env, morel.Outcome(reward, ~ended, ended, ended, reward)

    frames = 100 * np.random.default_rng(0).integers(0, 3, (8, 5))
    starts = empty_episodes(8, 5)
    frames = np.broadcast_to(frames[..., None, None, None], starts.frames.shape)
    starts = starts._replace(frames=jnp.asarray(frames, jnp.uint8))
    params = policy.init(jax.random.key(0), starts.frames)
    env = jax.tree.map(lambda x: x[:, 0], starts)
    state = morel.TrainState(params, optimizer.init(params), None, None, None, jnp.int32(0))

    @jax.jit
    def collect(params, env, key):
        rollout_key, order_key = jax.random.split(key)
        env, steps, metrics = morel.rollout(params, env, starts, rollout_key, step, policy, args)
        advantage = morel.advantages(steps, args)
        return env, steps, metrics, advantage, morel.minibatches(order_key, *advantage.shape, args)

    rewards = []
    for i in range(40):
        env, steps, metrics, advantage, order = collect(state.params, env, jax.random.key(i))
        for index in order:
            state, _ = morel.learn(state, steps, advantage, index, policy, args)
        rewards.append(float(metrics["charts/discrepancy"]))  # which this step sets to the reward
    assert rewards[0] < 0.6
    assert np.mean(rewards[-5:]) > 0.9


def test_discrepancies_are_of_frames_or_blocks_as_told(members, env, monkeypatch):
    blocks = []

    def discrepancy(image, reward, block):
        blocks.append(block)
        return jnp.zeros(4)

    monkeypatch.setattr(morel, "discrepancy", discrepancy)
    for name in ("frame", "block"):
        args = dataclasses.replace(ARGS, discrepancy=name)
        step = partial(morel.imagined_step, NETWORK, args=args)
        jax.eval_shape(step, members, env, jnp.arange(4), jnp.inf)
    assert blocks == [84, 7]


def test_each_process_has_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = []
    for i in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rows.append([*range(12)[morel.process_rows(12)]])
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_minibatch_has_as_many_steps_of_each_episode_and_an_epoch_each_once():
    order = morel.minibatches(jax.random.key(0), 3, 4, ARGS)
    assert order.shape == (2 * 2, 3, 2)
    for epoch in (order[:2], order[2:]):
        steps = np.concatenate(epoch, axis=1)
        np.testing.assert_array_equal(np.sort(steps, axis=1), [[0, 1, 2, 3]] * 3)
    assert (order[:2] != order[2:]).any()
    assert (order[:, 0] != order[:, 1]).any()  # another order for each episode


def test_imagined_steps_halt_above_the_threshold_of_the_state_in_worlds_of_all_members(
    members, toy_store
):
    args, policy = dataclasses.replace(ARGS, batch_size=8, starts=1), Linear()
    state = jax.jit(morel.init_state, static_argnums=(1, 2, 3))(
        jax.random.key(0), policy, NETWORK, args
    )
    windows, _ = morel.sample_starts(toy_store, (0, 0), 8, args)
    inputs = windows, members, jax.random.key(0), policy, NETWORK, args
    terminated = []
    for threshold in (-1.0, np.inf):
        copy = jax.tree.map(jnp.copy, state._replace(threshold=jnp.float32(threshold)))
        after, steps, advantage, _, metrics = morel.collect(copy, *inputs)
        terminated.append(float(steps.terminated.mean()))
        assert len(set(after.env.member.tolist())) > 1
    assert terminated[0] == 1
    assert terminated[1] < 1
    first = np.array(START(members, windows, jnp.zeros(8, jnp.int32)).frames)
    np.testing.assert_array_equal(steps.frames[:, 0], first)
    frames = np.array(after.env.frames)  # a copy: `collect` donates its state
    assert (frames != first).any()
    going_on = morel.collect(jax.tree.map(jnp.copy, after), *inputs)[1]
    np.testing.assert_array_equal(going_on.frames[:, 0], frames)
    explained = 1 - jnp.var(advantage) / jnp.var(steps.value + advantage)
    assert metrics["charts/explained_variance"] == pytest.approx(float(explained), abs=1e-4)
    actions = []
    for step in (1, 2, 1):  # an update draws anew, one that is repeated the same
        copy = jax.tree.map(jnp.copy, state._replace(step=jnp.int32(step)))
        actions.append(morel.collect(copy, *inputs)[1].action.tolist())
    assert actions[0] == actions[2] != actions[1]


def test_an_update_learns_from_the_minibatches_of_its_steps(monkeypatch):
    """Every minibatch once and in turn, with the advantages that belong to its steps."""
    steps = jnp.arange(12.0).reshape(3, 4)
    order, seen = morel.minibatches(jax.random.key(0), 3, 4, ARGS), []

    def loss(params, batch, advantage, policy, args):
        seen.append((batch, advantage))
        return jnp.sum(params["x"]), {"losses/total": jnp.float32(len(seen))}

    collected = {"charts/episodes": jnp.float32(2)}
    outputs = (steps, 10 * steps, order, collected)
    monkeypatch.setattr(morel, "collect", lambda state, *_: (state, *outputs))
    monkeypatch.setattr(morel, "ppo_loss", loss)
    params = {"x": jnp.zeros(1)}
    optimizer = morel.make_optimizer(ARGS).init(params)
    state = morel.TrainState(params, optimizer, None, None, None, jnp.int32(0))
    with jax.disable_jit():
        state, metrics = morel.update(state, None, None, None, None, None, ARGS)
    assert metrics["losses/total"] == pytest.approx(np.mean([1, 2, 3, 4]))
    assert metrics["charts/grad_norm"] == 1
    assert metrics["charts/episodes"] == 2
    assert state.params["x"] < 0
    for index, (batch, advantage) in zip(order, seen, strict=True):
        np.testing.assert_array_equal(batch, np.take_along_axis(steps, index, axis=1))
        np.testing.assert_array_equal(advantage, 10 * batch)


def test_two_gradient_steps_wait_for_a_device_at_most(monkeypatch):
    """The devices of a CPU hang if 32 programs do."""
    waiting, numbers = [], []

    def learn(state, steps, advantage, index, *_):
        waiting.append({"index": index})
        numbers.append(len(waiting))
        return state, waiting[-1]

    monkeypatch.setattr(morel, "collect", lambda state, *_: (state, None, None, range(40), {}))
    monkeypatch.setattr(morel, "learn", learn)
    monkeypatch.setattr(jax, "block_until_ready", lambda done: list(map(waiting.remove, done)))
    _, metrics = morel.update(*7 * [None])
    assert metrics["index"] == 19.5
    assert max(numbers) == 2


def test_cloning_learns_the_logged_actions_but_those_of_last_steps():
    """The intensity of the newest frame tells the action; last steps say another one."""
    rng, args = np.random.default_rng(0), dataclasses.replace(ARGS, bc_learning_rate=0.1)
    action = rng.integers(0, 3, (60, 1)).astype(np.int32)
    is_last = (rng.random((60, 1)) < 0.5) & (action == 2)
    frames = np.broadcast_to(100 * action[..., None, None], (60, 4, 2, 2)).astype(np.uint8)
    batch = morel.Batch(
        *(frames, np.full((60, 1), 3, np.uint8), np.where(is_last, 0, action)),
        *(np.zeros((60, 1), np.float32), is_last, is_last),
    )
    policy = Linear()
    params = policy.init(jax.random.key(0), jnp.zeros((2, 2, 4), jnp.uint8))
    opt_state = optax.adam(0.1).init(params)
    for _ in range(300):
        params, opt_state, loss = morel.clone(params, opt_state, batch, policy, args)
    assert loss < 0.1
    logits, _ = policy.apply(params, np.moveaxis(frames, 1, -1))
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), action[:, 0])


def test_the_learning_rate_falls_to_zero():
    optimizer, params = morel.make_optimizer(ARGS), {"x": jnp.ones(2)}
    state, sizes, moments = optimizer.init(params), [], []
    for _ in range(2):
        delta, state = optimizer.update({"x": jnp.array([3.0, -4.0])}, state, params)
        sizes.append(float(optax.tree.norm(delta)))
        moments.append(float(optax.tree.norm(optax.tree.get(state, "mu"))))
        state = optax.tree.set(state, count=jnp.int32(ARGS.anneal_updates * 2 * 2))
    assert sizes[0] == pytest.approx(2.5e-4 * np.sqrt(2), rel=1e-2)
    assert sizes[1] == 0
    assert moments[0] == pytest.approx(0.1 * 0.5)  # the gradient is clipped to 0.5


def test_starts_are_half_first_frames_and_end_where_the_logged_actions_go_on(
    toy_store, monkeypatch
):
    count, firsts, ends = 200, 0, 0
    windows, actions = morel.sample_starts(toy_store, (0, 1), count, ARGS)
    assert windows.frame.shape == (count, 5, 84, 84)
    shades = windows.frame[:, :, 0, 0]
    for i in range(count):
        for t in range(5):
            first = windows.is_first[i, t]
            assert (windows.action[i, t] == -1) == first
            assert shades[i, t] == (0 if first else 40 * (windows.action[i, t] + 1))
        firsts += windows.is_first[i, -1]
        ends += actions[i, -1] == -1
        assert actions[i, 0] >= 0  # a last frame is no start
        assert (np.diff(actions[i] == -1) >= 0).all()
    assert 0.4 < firsts / count < 0.65
    assert 0 < ends < 50
    later, _ = morel.sample_starts(toy_store, (0, 2), count, ARGS)
    assert (later.frame != windows.frame).any()
    monkeypatch.setattr(morel, "process_rows", lambda count: slice(50, 60))
    part, _ = morel.sample_starts(toy_store, (0, 1), count, ARGS)
    np.testing.assert_array_equal(part.frame, windows.frame[50:60])
    # The logged action at a start is the one before the next frame.
    begins = toy_store.episodes["start"]
    logged = {tuple(toy_store.steps["action"][b : b + 3].tolist()) for b in begins}
    for i in np.flatnonzero(windows.is_first[:, -1]):
        assert tuple(actions[i].tolist()) in logged


def test_replays_go_through_the_steps_of_the_pessimistic_mdp(members, toy_store):
    windows, actions = morel.sample_starts(toy_store, (0, 0), 4, ARGS)
    actions[2, 1:] = -1
    disc = morel.replay(members, windows, actions, NETWORK, ARGS)
    env, alive = START(members, windows, jnp.array([0, 1, 2, 0])), np.ones(4, bool)
    for t in range(3):
        env, outcome = STEP(members, env, actions[:, t], jnp.inf)
        expected = np.where(alive & (actions[:, t] >= 0), outcome.discrepancy, np.nan)
        np.testing.assert_allclose(disc[:, t], expected, rtol=1e-4)
        alive &= ~np.asarray(outcome.terminated)


def test_the_threshold_is_the_quantile_of_running_steps(monkeypatch, toy_store, tmp_path, capsys):
    logged, lines = np.arange(20.0).reshape(4, 5), []
    logged[3, 2:] = np.nan  # 17 to 19
    replays = iter((logged, logged + 10, logged, logged))
    monkeypatch.setattr(morel, "replay", lambda *_: next(replays))
    log = lambda *line: lines.append(line)  # noqa: E731
    run = SimpleNamespace(stopping=False, writes=True, log=log, dir=tmp_path)
    args = dataclasses.replace(ARGS, batch_size=4, halt_batches=1, halt_quantile=0.75)
    threshold = morel.measure_halting(run, toy_store, None, None, lambda tree: tree, args)
    assert threshold == np.quantile(np.arange(17), 0.75) == 12
    assert lines == [(0, 0, dict(zip(HALTING, (12, 0.5, 1), strict=True)))]
    hint = "the members hardly tell unknown actions from logged ones"
    assert hint not in capsys.readouterr().out
    morel.measure_halting(run, toy_store, None, None, lambda tree: tree, args)
    assert hint in capsys.readouterr().out


def test_half_of_the_replays_have_random_actions(monkeypatch, toy_store, tmp_path):
    given = []

    def replay(members, windows, actions, *_):
        given.append(np.asarray(actions))
        return np.ones((4, 5))

    monkeypatch.setattr(morel, "replay", replay)
    args = dataclasses.replace(ARGS, batch_size=4, halt_batches=2, horizon=5)
    run = SimpleNamespace(stopping=False, writes=False, log=lambda *_: None, dir=tmp_path)
    morel.measure_halting(run, toy_store, None, None, lambda tree: tree, args)
    for i, (logged, random) in enumerate(zip(given[::2], given[1::2], strict=True)):
        expected = morel.sample_starts(toy_store, (args.seed, i, 1), 4, args)[1]
        np.testing.assert_array_equal(logged, expected)
        assert set(random.ravel().tolist()) <= set(range(6))
        assert (random != logged).mean() > 0.5
    assert (given[1] != given[3]).any()


def test_one_ctrl_c_stops_every_part_of_the_second_phase_which_goes_on_exactly(
    members, toy_path, toy_store, cache_dir, tmp_path, monkeypatch, capsys
):
    model, handlers, data = tmp_path / "model", {}, toy_store.facts
    options = f"{TINY} --channels 4 --batch-size 4 --starts 2 --halt-batches 2 --log-every 2"
    options += " --bc-updates 2 --bc-batch-size 4 --total-updates 5 --eval-every 2"
    options += " --checkpoint-every 3 --eval-episodes 1 --final-eval-episodes 1"
    options = [*options.split(), "--dataset", str(toy_path), "--world-model", str(model)]

    def parse(*more):
        return tyro.cli(morel.Args, args=[*options, *more])

    def play(act, *_):
        action = act(np.zeros((1, 84, 84, 4), np.uint8), jax.random.key(0))
        return None if action is None else [float(action[0])]

    helpers.without_blocks(monkeypatch, "morel_atari")
    helpers.save_world_model(model, parse(), members, data)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(morel, "evaluate", play)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))

    def run(name: str):  # with the same arguments, so that it is compiled once
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        morel.main(parse("--run-dir", "run"))
        return metrics(tmp_path / name / "run")

    entropies, thresholds = [], set()
    sample_starts, collect = morel.sample_starts, morel.collect

    def noted_starts(store, entropy, *inputs):
        entropies.append(entropy)
        return sample_starts(store, entropy, *inputs)

    def noted_collect(state, *inputs):
        thresholds.add(float(state.threshold))
        return collect(state, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(morel, "sample_starts", noted_starts)
        patch.setattr(morel, "collect", noted_collect)
        whole = run("whole")
    (threshold,) = thresholds
    assert threshold == pytest.approx(whole[0]["charts/threshold"]) != 0
    assert {*[(0, i) for i in range(5)], *[(0, i, 1) for i in range(2)]} <= set(entropies)
    assert [x["update"] for x in whole if "losses/total" in x] == [2, 4]
    assert [x["update"] for x in whole if "eval/returns" in x] == [2, 4, 5]
    assert set(whole[0]) == {"update", "seed", *HALTING}
    assert all(0 <= whole[0][name] <= 1 for name in HALTING[1:])
    assert (tmp_path / "whole" / "run" / "discrepancy.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # slow

    parts = [("replay", 0), ("clone", 0), ("collect", 1), ("evaluate", 2), ("collect", 3)]
    for name, update in [*parts, ("evaluate", 4), ("finish_run", 5)]:
        original = getattr(morel, name)

        def interrupt(*inputs, original=original):
            if signal.SIGINT in handlers:  # once
                handlers.pop(signal.SIGINT)(signal.SIGTERM, None)
            return original(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(morel, name, interrupt)
            with pytest.raises(SystemExit) as stopped:
                run("stopped")
        assert stopped.value.code == 130
        expected = f"Stopped at update {update}; the same command goes on."
        assert expected in capsys.readouterr().err
    helpers.save_world_model(model, parse(), jax.tree.map(lambda x: x + 1, members), data)
    with pytest.raises(SystemExit, match=r"holds something else .*world_model_crc32"):
        run("stopped")
    helpers.save_world_model(model, parse(), members, data)
    assert run("stopped") == whole
    assert "Going on from update 5" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "stopped"}
    options[-1] = os.path.relpath(model)  # counts by its content
    with pytest.raises(SystemExit) as end:
        run("stopped")
    assert end.value.code == 0
    assert "This run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_updates": 2000}, "--total-updates 2000 is more than --anneal-updates 1250"),
        ({"minibatches": 5}, "--rollout-length 128 must be a multiple of --minibatches 5"),
    ],
)
def test_bad_arguments_give_one_sentence(change, message):
    morel.check_policy_args(morel.Args())
    with pytest.raises(SystemExit, match=message):
        morel.check_policy_args(morel.Args(**change))


def test_the_learning_rate_can_stay_as_it_is():
    args = dataclasses.replace(ARGS, anneal_updates=10**9, learning_rate=0.5)
    params = {"x": jnp.ones(2)}
    optimizer = morel.make_optimizer(args)
    delta, _ = optimizer.update({"x": jnp.ones(2)}, optimizer.init(params), params)
    np.testing.assert_allclose(delta["x"], -0.5, rtol=1e-3)


def test_acting_samples_the_policy_or_takes_its_most_probable_action():
    policy, observation = Linear(), jnp.full((4000, 2, 2, 4), 100, jnp.uint8)
    params = policy.init(jax.random.key(0), observation[:1])
    probs = jax.nn.softmax(policy.apply(params, observation[:1])[0][0])
    inputs = params, observation, jax.random.key(0)
    assert set(morel.act(*inputs, True, policy, ARGS).tolist()) == {int(probs.argmax())}
    sampled = np.bincount(morel.act(*inputs, False, policy, ARGS), minlength=3) / 4000
    np.testing.assert_allclose(sampled, probs, atol=0.03)


def test_evaluations_have_games_of_their_own_and_the_final_ones_sample_first(monkeypatch):
    """combo_atari.py has the same functions."""
    games, final = [], []

    def evaluate(policy, env_id, number, seed, frames):
        games.append((seed, frames, policy(None, None)))
        return [1.0] * number

    monkeypatch.setattr(morel, "evaluate", evaluate)
    monkeypatch.setattr(morel, "act", lambda params, x, key, greedy, *_: greedy)
    run = SimpleNamespace(stopping=False, writes=True, show=lambda *_: None)
    run.time, run.log = lambda part: nullcontext(), lambda *_: None
    run.finish = lambda *inputs: final.append(inputs)
    for seed in (0, 1):
        args = dataclasses.replace(ARGS, seed=seed, eval_greedy=seed == 0, eval_max_frames=44)
        for done in (4, 8):
            morel.evaluate_agent(run, done, {}, None, args)
        morel.finish_run(run, 8, {}, None, args)
    seeds, frames, greedy = zip(*games, strict=True)
    assert greedy == (True, True, False, True, False, False, False, True)
    assert len(set(seeds)) == 4  # of two seeds at two updates
    assert set(frames) == {44}
    assert len(final) == 2
    run.stopping = True  # before the games are made, which takes long
    assert morel.play(run, 100, True, 8, {}, None, args) is None
    assert len(games) == 8
