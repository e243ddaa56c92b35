"""The mathematics of rosmo_bsuite.py against naive loops and known answers."""

import dataclasses
import importlib.util
import itertools
import math
import sys
from functools import partial
from types import ModuleType

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bc_bsuite as bc
import muzero_unplugged_bsuite as muzero
import rosmo_bsuite as rosmo

pytestmark = pytest.mark.usefixtures("hurry")
ARGS = rosmo.Args(env_id="catch", dynamics_hidden=16, unroll_steps=3, td_steps=2)
NETWORK = rosmo.MuZeroNetwork(3, ARGS.num_bins, ARGS.dynamics_hidden, ARGS.dtype)
KEY = jax.random.key(0)
rosmo_loss = jax.jit(rosmo.rosmo_loss, static_argnums=(4, 5))
apply_network = jax.jit(NETWORK.apply, static_argnames="method")


random_params = partial(helpers.make_params, rosmo, NETWORK)


def random_batch(batch_size: int, args=ARGS, seed: int = 0) -> rosmo.Steps:
    return helpers.random_steps(batch_size, rosmo.window_length(args), seed)


# Value transform and categorical representation (Appendix A.2).


def test_transform_is_inverted_and_equals_rlax(monkeypatch):
    x = jnp.concatenate([jnp.linspace(-300.0, 300.0, 601), jnp.array([1e-3, -1e-3, 1e5])])
    # This module of rlax alone: the others need TensorFlow, whose import takes seconds.
    package = ModuleType("rlax")
    package.__path__ = importlib.util.find_spec("rlax").submodule_search_locations
    monkeypatch.setitem(sys.modules, "rlax", package)
    expected = importlib.import_module("rlax._src.transforms").signed_hyperbolic(x)
    np.testing.assert_allclose(rosmo.transform(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rosmo.inverse_transform(rosmo.transform(x)), x, rtol=1e-4, atol=1e-5)
    assert rosmo.transform(jnp.float32(3.0)) == pytest.approx(1.003)


def test_two_hot_by_hand():
    y = 1.25  # between the integers 1 and 2
    target = rosmo.two_hot(rosmo.inverse_transform(jnp.float32(y)), 20)
    expected = np.zeros(20)
    expected[1 + 9], expected[2 + 9] = 0.75, 0.25
    np.testing.assert_allclose(target, expected, atol=1e-5)


def test_two_hot_stops_at_nine_and_leaves_the_last_of_20_bins_unused():
    targets = rosmo.two_hot(jnp.array([-1e6, 0.0, 1e6]), 20)
    assert np.argmax(targets, axis=1).tolist() == [0, 9, 18]
    assert np.all(targets[:, 19] == 0)
    np.testing.assert_allclose(targets.sum(axis=1), 1)


@pytest.mark.parametrize("num_bins", [20, 601])
def test_to_scalar_inverts_two_hot(num_bins):
    x = jnp.linspace(-60.0, 60.0, 97)
    logits = jnp.log(rosmo.two_hot(x, num_bins) + 1e-30)
    np.testing.assert_allclose(rosmo.to_scalar(logits), x, rtol=1e-3, atol=1e-4)


# Windows and the value target (Eq. 8).


def naive_positions(is_last, is_terminal):
    moving, absorbing, known = [], [], []
    state = "inside"
    for last, terminal in zip(is_last, is_terminal, strict=True):
        if state == "inside":
            moving.append(not last)
            absorbing.append(bool(last and terminal))
            known.append(True)
            if last:
                state = "absorbed" if terminal else "unknown"
        else:
            moving.append(False)
            absorbing.append(state == "absorbed")
            known.append(state == "absorbed")
    return moving, absorbing, known


def naive_value_target(reward, value, is_last, is_terminal, t, discount, td_steps):
    """Follows one trajectory from t until n rewards or the end of its first episode."""
    moving, absorbing, _ = naive_positions(is_last, is_terminal)
    total, factor = 0.0, 1.0
    for i in range(t, t + td_steps):
        if not moving[i]:
            return total + factor * (0.0 if absorbing[i] else value[i])
        total += factor * reward[i]
        factor *= discount
    return total + factor * (0.0 if absorbing[t + td_steps] else value[t + td_steps])


def test_window_positions_and_value_target_against_loops():
    batch = random_batch(200, dataclasses.replace(ARGS, unroll_steps=6, td_steps=3))
    value = np.random.default_rng(1).normal(size=batch.reward.shape).astype(np.float32)
    positions = rosmo.window_positions(batch.is_last, batch.is_terminal)
    targets = rosmo.value_target(batch.reward, value, *positions[:2], 0.9, 3)
    assert targets.shape == (200, 7)
    for b in range(200):
        ends = batch.is_last[b], batch.is_terminal[b]
        for ours, naive in zip(positions, naive_positions(*ends), strict=True):
            assert ours[b].tolist() == naive
        for t in range(7):
            expected = naive_value_target(batch.reward[b], value[b], *ends, t, 0.9, 3)
            assert targets[b, t] == pytest.approx(expected, abs=1e-5)


def test_truncation_as_termination_makes_every_last_step_terminal():
    batch, args = random_batch(16), dataclasses.replace(ARGS, truncation_as_termination=True)
    assert (batch.is_last & ~batch.is_terminal).any()
    inputs = random_params(0), random_params(1)
    losses = [
        rosmo_loss(*inputs, batch, KEY, NETWORK, args)[0],
        rosmo_loss(*inputs, batch._replace(is_terminal=batch.is_last), KEY, NETWORK, ARGS)[0],
        rosmo_loss(*inputs, batch, KEY, NETWORK, ARGS)[0],
    ]
    assert losses[0] == losses[1] != losses[2]


# Policy targets (Eq. 6, 9, 10).


def test_policy_target_against_brute_force():
    rng = np.random.default_rng(0)
    logits, advantage = rng.normal(size=(2, 50, 3))
    prior = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = prior * np.exp(advantage)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(rosmo.policy_target(logits, advantage), expected, rtol=1e-4)


def test_policy_target_of_large_advantages_is_finite_and_right():
    target = rosmo.policy_target(jnp.log(jnp.array([0.2, 0.3, 0.5])), jnp.array([200.0, 199.0, 0]))
    expected = np.array([0.2, 0.3 * math.exp(-1), 0]) / (0.2 + 0.3 * math.exp(-1))
    np.testing.assert_allclose(target, expected, rtol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_sampled_policy_target_against_loops(num_samples):
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=(30, num_samples)).astype(np.float32)
    action = rng.integers(0, 3, (30, num_samples))
    expected = np.zeros((30, 3))
    for b in range(30):
        for k in range(num_samples):
            others = sum(math.exp(advantage[b, i]) for i in range(num_samples) if i != k)
            normalizer = (1 + others) / num_samples
            expected[b, action[b, k]] += math.exp(advantage[b, k]) / normalizer / num_samples
    ours = rosmo.sampled_policy_target(advantage, action, 3)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_weights_of_the_sampled_policy_target_stop_at_e_to_the_20():
    """Of two samples; the first one's normaliser is (1 + e^0) / 2, the other's is huge."""
    target = rosmo.sampled_policy_target(jnp.array([[200.0, 0.0]]), jnp.array([[0, 1]]), 3)
    np.testing.assert_allclose(target, [[math.exp(20) / 2, 0, 0]], rtol=1e-5)


def test_sampled_gradient_approaches_the_exact_one():
    """With many samples, Eq. 9's gradient is that of Eq. 5 for exp(adv) / E[exp(adv)]."""
    prior = jnp.array([0.5, 0.3, 0.2])
    advantage = jnp.array([0.4, -0.3, 0.8])
    logits = jnp.array([0.1, 0.2, -0.3])
    action = jax.random.categorical(jax.random.key(0), jnp.log(prior), shape=(2000, 64))
    target = rosmo.sampled_policy_target(advantage[action], action, 3).mean(axis=0)
    sampled = jax.grad(lambda x: optax.softmax_cross_entropy(x, target))(logits)
    exact = jax.grad(
        lambda x: optax.softmax_cross_entropy(x, rosmo.policy_target(jnp.log(prior), advantage))
    )(logits)
    np.testing.assert_allclose(sampled, exact, atol=0.015)


def candidates(target_params, observation, num_samples, key, args=ARGS):
    """improve's answers and, one state and action at a time, q_g(s, a) - v(s) and the prior."""
    args = dataclasses.replace(args, num_samples=num_samples)
    state = apply_network(target_params, observation, method="representation")
    prediction = apply_network(target_params, state, method="prediction")
    logged = np.random.default_rng(5).integers(0, 3, observation.shape[:2]).astype(np.int32)
    improve = jax.jit(partial(rosmo.improve, network=NETWORK, args=args))
    answers = improve(target_params, state, prediction, logged, key)
    adv = np.zeros((*logged.shape, 3))
    for a in range(3):
        after = apply_network(target_params, state, jnp.full_like(logged, a), method="dynamics")
        after = apply_network(target_params, after, method="prediction")
        reward, value = rosmo.to_scalar(after.reward_logits), rosmo.to_scalar(after.value_logits)
        adv[..., a] = reward + args.discount * value - rosmo.to_scalar(prediction.value_logits)
    logged_adv = np.take_along_axis(adv, logged[..., None], axis=-1)[..., 0]
    return answers, adv, logged_adv, prediction.policy_logits


@pytest.mark.parametrize("num_samples", [None, 1, 4])
def test_policies_are_improved_with_the_advantages_that_the_model_says(num_samples):
    """Each state's, also that of the logged action, which no target contains if it is sampled."""
    params, args = random_params(0), dataclasses.replace(ARGS, discount=0.7)
    observation = random_batch(30).observation[:, :4]
    answers, adv, adv_logged, logits = candidates(params, observation, num_samples, KEY, args)
    p, advantage, ours_logged = (np.asarray(x, np.float64) for x in answers)
    assert np.abs(adv - adv.mean(axis=-1, keepdims=True)).max() > 0.05  # actions matter
    np.testing.assert_allclose(ours_logged, adv_logged, rtol=1e-3, atol=1e-4)
    if num_samples is None:
        np.testing.assert_allclose(advantage, adv, rtol=1e-3, atol=1e-4)
        weights = np.exp(np.asarray(logits) + adv)
        np.testing.assert_allclose(p, weights / weights.sum(-1, keepdims=True), rtol=1e-3)
        return
    # Each sampled action is the one that has its advantage; with these, p is Eq. 9 and 10.
    assert advantage.shape == (30, 4, num_samples)
    action = np.abs(advantage[..., None] - adv[..., None, :]).argmin(axis=-1)
    np.testing.assert_allclose(
        advantage, np.take_along_axis(adv, action, axis=-1), rtol=1e-3, atol=1e-4
    )
    expected = np.zeros_like(p)
    for index in np.ndindex(30, 4, num_samples):
        others = np.exp(np.delete(advantage[index[:2]], index[2])).sum()
        weight = np.exp(advantage[index]) / ((1 + others) / num_samples)
        expected[(*index[:2], action[index])] += weight / num_samples
    np.testing.assert_allclose(p, expected, rtol=1e-3, atol=1e-4)


# The whole loss (Algorithm 2), one window and one step at a time.


def naive_losses(params, target_params, batch, b, args):
    """Losses of window b in plain Python; the actions past an end must not be needed."""

    def apply(p, method, *inputs):
        return apply_network(p, *(jnp.asarray(x) for x in inputs), method=method)

    def look_ahead(state, action):
        after = apply(target_params, "prediction", apply(target_params, "dynamics", state, action))
        reward = float(rosmo.to_scalar(after.reward_logits))
        return reward + args.discount * float(rosmo.to_scalar(after.value_logits))

    ends = batch.is_last[b], batch.is_terminal[b]
    moving, absorbing, known = naive_positions(*ends)
    target_states = [apply(target_params, "representation", o) for o in batch.observation[b]]
    targets = [apply(target_params, "prediction", s) for s in target_states]
    value = [float(rosmo.to_scalar(t.value_logits)) for t in targets]
    losses = {"reward": 0.0, "value": 0.0, "policy": 0.0, "behavior": 0.0}
    charts = {name: [] for name in ("value", "value_target", "imitated", "policy_entropy")}
    charts["advantages"] = []
    state = apply(params, "representation", batch.observation[b, 0])
    last = args.unroll_steps
    for k in range(last + 1):
        output = apply(params, "prediction", state)
        log_pi = np.log(np.asarray(jax.nn.softmax(output.policy_logits)))
        log_v = np.log(np.asarray(jax.nn.softmax(output.value_logits)))
        log_r = np.log(np.asarray(jax.nn.softmax(output.reward_logits)))
        charts["value"].append(float(rosmo.to_scalar(output.value_logits)))
        charts["policy_entropy"].append(-np.exp(log_pi) @ log_pi)
        if k > 0 and known[k]:
            reward = batch.reward[b, k - 1] if moving[k - 1] else 0.0
            phi = np.asarray(rosmo.two_hot(jnp.float32(reward), args.num_bins))
            losses["reward"] -= phi @ log_r / last
        if known[k]:
            z = naive_value_target(batch.reward[b], value, *ends, k, args.discount, args.td_steps)
            charts["value_target"].append(z)
            phi = np.asarray(rosmo.two_hot(jnp.float32(z), args.num_bins))
            losses["value"] -= args.value_coef * phi @ log_v / (last + 1)
            prior = np.asarray(jax.nn.softmax(targets[k].policy_logits))
            q = np.array([look_ahead(target_states[k], a) for a in range(3)])
            charts["advantages"] += [*(q - value[k])]
            p = prior * np.exp(q - value[k])
            p = np.full(3, 1 / 3) if absorbing[k] else p / p.sum()
            losses["policy"] -= args.policy_coef * p @ log_pi / (last + 1)
        if moving[k]:
            action = batch.action[b, k]
            if args.behavior_advantage == "model":
                following = look_ahead(target_states[k], action)
            else:
                following = float(rosmo.to_scalar(targets[k + 1].reward_logits))
                following += args.discount * value[k + 1]
            charts["imitated"].append(following - value[k] > 0)
            if following - value[k] > 0:
                losses["behavior"] -= args.behavior_coef * log_pi[action] / (last + 1)
            if k < last:
                state = apply(params, "dynamics", state, action)
        elif k < last:  # a random action of the loss's own; only the constants can be compared
            break
        else:
            charts["imitated"].append(False)
    return losses | {f"charts/{name}": values for name, values in charts.items()}


@pytest.mark.parametrize("behavior_advantage", ["model", "next-observation"])
def test_losses_against_a_naive_algorithm_2(behavior_advantage):
    """With coefficients of its own, as Fig. 4(d) sets them to zero."""
    coefs = {"value_coef": 0.5, "policy_coef": 0.7, "behavior_coef": 0.4}
    args = dataclasses.replace(ARGS, behavior_advantage=behavior_advantage, discount=0.3, **coefs)
    params, target_params = random_params(0), random_params(1, 0.2)
    batch = random_batch(40, args)
    whole = [b for b in range(40) if not batch.is_last[b, : args.unroll_steps].any()]
    batch = rosmo.Steps(*(x[whole] for x in batch))
    assert batch.is_last[:, args.unroll_steps :].any()
    naive = [naive_losses(params, target_params, batch, b, args) for b in range(len(whole))]
    if behavior_advantage == "next-observation":  # where γ decides whether some are imitated
        undiscounted = dataclasses.replace(args, discount=1.0)
        others = [
            naive_losses(params, target_params, batch, b, undiscounted) for b in range(len(whole))
        ]
        assert [x["behavior"] for x in naive] != [x["behavior"] for x in others]
    _, metrics = rosmo_loss(params, target_params, batch, KEY, NETWORK, args)
    for name in ("reward", "value", "policy", "behavior"):
        expected = np.mean([x[name] for x in naive])
        assert expected != 0
        assert metrics[f"losses/{name}"] == pytest.approx(expected, rel=1e-4), name
    total = sum(metrics[f"losses/{name}"] for name in ("reward", "value", "policy", "behavior"))
    assert metrics["losses/total"] == pytest.approx(float(total))
    for name in ("value", "value_target", "imitated", "policy_entropy"):
        expected = np.mean([x[f"charts/{name}"] for x in naive])
        assert metrics[f"charts/{name}"] == pytest.approx(expected, rel=1e-4), name
    std = np.std([x["charts/advantages"] for x in naive])
    assert metrics["charts/advantage_std"] == pytest.approx(std, rel=1e-3)


def one_window(is_last, is_terminal):
    batch = random_batch(1, seed=3)
    flags = np.array([is_last], bool), np.array([is_terminal], bool)
    return rosmo.Steps(batch.observation, batch.action, batch.reward, *flags)


def constant_heads(policy_bias):
    """Parameters with uniform distributions of values and rewards, and with one policy."""
    init = helpers.compiled_init(NETWORK)
    params = init(jax.random.key(0), jnp.zeros((10, 5)), jnp.int32(0))["params"]
    policy = params["policy"] | {"bias": jnp.array(policy_bias)}
    return {"params": params | {"policy": policy}}


def test_absorbing_states_have_uniform_policy_zero_value_and_no_behaviour():
    """A window that starts at a terminal state: every target is known without the network."""
    params = random_params(0)
    ended = one_window([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0])
    key = jax.random.key(0)
    _, metrics = rosmo_loss(params, random_params(1), ended, key, NETWORK, ARGS)
    assert metrics["losses/behavior"] == 0
    assert metrics["charts/value_target"] == 0
    # Past the end actions are random, so that rewards are predicted for others with another key.
    keys = [jax.random.key(i) for i in range(3)]
    losses = [rosmo_loss(params, random_params(1), ended, k, NETWORK, ARGS)[1] for k in keys]
    assert len({float(x["losses/reward"]) for x in losses}) == 3
    # What lies beyond the end (observations, rewards, actions) must not matter.
    other = random_batch(1, seed=4)
    observation = np.concatenate([ended.observation[:, :1], other.observation[:, 1:]], axis=1)
    changed = ended._replace(observation=observation, action=other.action, reward=other.reward)
    _, same = rosmo_loss(params, random_params(1), changed, key, NETWORK, ARGS)
    for name in ("losses/reward", "losses/value", "losses/policy", "losses/behavior"):
        assert same[name] == pytest.approx(float(metrics[name]), abs=1e-6), name
    # Where π is softmax(0, 1, 2), the policy loss of a uniform target is known at every step.
    params = constant_heads([0.0, 1.0, 2.0])
    _, metrics = rosmo_loss(params, params, ended, key, NETWORK, ARGS)
    expected = math.log(1 + math.e + math.e**2) - 1
    assert metrics["losses/policy"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_learned_past_a_truncated_end():
    truncated = one_window([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0])
    params, key = constant_heads([0.0, 0.0, 0.0]), jax.random.key(0)
    _, metrics = rosmo_loss(params, params, truncated, key, NETWORK, ARGS)
    assert metrics["losses/reward"] == 0
    assert metrics["losses/policy"] == pytest.approx(math.log(3) / 4, rel=1e-5)  # 1 of K+1 = 4
    assert metrics["losses/value"] == pytest.approx(0.25 * math.log(20) / 4, rel=1e-5)


def test_an_action_without_advantage_is_not_imitated():
    """Eq. 11's gate is 1[adv > 0]; with rewards equal to values and γ = 0, adv is zero."""
    params, never = constant_heads([0.0, 0.0, 0.0]), [0, 0, 0, 0, 0, 0]
    batch, args = one_window(never, never), dataclasses.replace(ARGS, discount=0.0)
    _, metrics = rosmo_loss(params, params, batch, jax.random.key(0), NETWORK, args)
    assert metrics["charts/imitated"] == metrics["losses/behavior"] == 0


def test_the_candidates_of_a_sampled_target_come_from_the_prior_alone():
    """Where π is certain, so is the target, whatever the logged actions."""
    params, batch = constant_heads([30.0, 0.0, 0.0]), random_batch(16)
    never, args = np.zeros_like(batch.is_last), dataclasses.replace(ARGS, num_samples=2)
    batch = batch._replace(is_last=never, is_terminal=never)
    assert (batch.action > 0).any()
    _, metrics = rosmo_loss(params, params, batch, jax.random.key(0), NETWORK, args)
    assert metrics["losses/policy"] == pytest.approx(0, abs=1e-3)


def test_every_parameter_gets_a_gradient():
    params, target_params, batch = random_params(0), random_params(1), random_batch(16)
    loss = lambda p, t: rosmo.rosmo_loss(p, t, batch, jax.random.key(0), NETWORK, ARGS)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params, target_params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_sampled_loss_approaches_the_exact_one():
    """From below: the 1 in Eq. 10 makes the weights small while N mean(exp(adv)) is near 1."""
    params, target_params, batch = random_params(0), random_params(1), random_batch(16)
    key = jax.random.key(0)
    _, exact = rosmo_loss(params, target_params, batch, key, NETWORK, ARGS)
    policy_losses = []
    for num_samples in (16, 1024):
        args = dataclasses.replace(ARGS, num_samples=num_samples)
        _, sampled = rosmo_loss(params, target_params, batch, key, NETWORK, args)
        np.testing.assert_allclose(sampled["losses/behavior"], exact["losses/behavior"], rtol=1e-5)
        policy_losses.append(float(sampled["losses/policy"]))
    assert policy_losses == sorted(policy_losses)
    assert exact["losses/policy"] > policy_losses[-1] > 0.95 * exact["losses/policy"]


@pytest.mark.parametrize("module", [rosmo, muzero])
def test_gradients_through_the_dynamics_are_halved_at_every_step(module, monkeypatch):
    """With one unrolled step and its reward alone, that is all of the gradient of h and g."""
    settings = {"dynamics_hidden": 16, "unroll_steps": 1, "td_steps": 2}
    args = module.Args(**settings, value_coef=0.0, policy_coef=0.0)
    if module is rosmo:
        args, loss = dataclasses.replace(args, behavior_coef=0.0), rosmo.rosmo_loss
    else:  # whose search does not matter here
        zeros = jnp.zeros((16, 4, 3)), jnp.zeros((16, 4))
        monkeypatch.setattr(muzero, "search", lambda *_: zeros)
        loss = muzero.muzero_loss
    inputs = random_params(0), random_params(1), random_batch(16, args), jax.random.key(0)

    def gradient():
        of_params = jax.jit(jax.grad(lambda *inputs: loss(*inputs, NETWORK, args)[0]))
        gradient = of_params(*inputs)["params"]
        return jax.tree.leaves((gradient["h"], gradient["g"]))

    halved = gradient()
    monkeypatch.setattr(module.optax, "scale_gradient", lambda x, _: x)
    for half, whole in zip(halved, gradient(), strict=True):
        assert np.any(half)
        np.testing.assert_allclose(2 * half, whole, rtol=1e-4, atol=1e-6)
    scales, args = [], dataclasses.replace(args, unroll_steps=3)
    if module is muzero:
        monkeypatch.setattr(
            muzero, "search", lambda *_: (jnp.zeros((16, 6, 3)), jnp.zeros((16, 6)))
        )
    monkeypatch.setattr(module.optax, "scale_gradient", lambda x, scale: scales.append(scale) or x)
    inputs = (*inputs[:2], random_batch(16, args), inputs[3])
    jax.eval_shape(lambda *inputs: loss(*inputs, NETWORK, args)[0], *inputs)
    assert scales == [0.5] * 3


# Network and acting.


def test_network_has_the_sizes_of_table_4():
    network = rosmo.MuZeroNetwork(3, 20, 256, "float32")
    params = network.init(jax.random.key(0), jnp.zeros((10, 5)), jnp.int32(0))["params"]

    def dense(*sizes):
        return sum((a + 1) * b for a, b in itertools.pairwise(sizes))

    count = {name: sum(x.size for x in jax.tree.leaves(p)) for name, p in params.items()}
    assert count == {
        "h": dense(50, 64, 64, 32),
        "g": dense(32 + 3, 32, 256, 32),
        "f": dense(32, 32),
        "policy": dense(32, 3),
        "value": dense(32, 20),
        "reward": dense(32, 20),
    }
    output = network.apply({"params": params}, jnp.ones((10, 5)), jnp.int32(0))
    assert all((x == 0).all() for x in output)  # zero-initialised heads


def test_acting_follows_the_improved_policy():
    """A network whose reward depends on the action: greedy acting takes the best action."""
    params = random_params(2)
    observation = jnp.asarray(random_batch(64).observation[:, 0])
    state = apply_network(params, observation, method="representation")
    prediction = apply_network(params, state, method="prediction")
    q = np.stack(
        [
            rosmo.look_ahead(params, state, jnp.full((64, 1), a), NETWORK, ARGS.discount)[:, 0]
            for a in range(3)
        ],
        axis=1,
    )
    best = np.argmax(np.asarray(jax.nn.log_softmax(prediction.policy_logits)) + q, axis=1)
    key = jax.random.key(0)
    assert rosmo.act(params, observation, key, True, NETWORK, ARGS).tolist() == best.tolist()
    raw = dataclasses.replace(ARGS, num_samples=2)
    greedy_raw = rosmo.act(params, observation, key, True, NETWORK, raw)
    assert greedy_raw.tolist() == np.argmax(prediction.policy_logits, axis=1).tolist()
    assert set(best.tolist()) != {0} or set(greedy_raw.tolist()) != {0}
    advantage = q - rosmo.to_scalar(prediction.value_logits)[:, None]
    target = np.array(rosmo.policy_target(prediction.policy_logits, advantage))
    prior = np.array(jax.nn.softmax(prediction.policy_logits))
    i = np.abs(prior - target).max(axis=1).argmax()  # where the two differ most
    assert np.abs(prior - target)[i].max() > 0.1
    many = jnp.broadcast_to(observation[i], (4000, *observation.shape[1:]))
    for args, policy in ((ARGS, target[i]), (raw, prior[i])):
        actions = np.asarray(rosmo.act(params, many, key, False, NETWORK, args))
        np.testing.assert_allclose(np.bincount(actions, minlength=3) / 4000, policy, atol=0.03)


# Data.


def test_sample_windows_are_consecutive_wrap_around_and_start_where_allowed():
    observation = np.arange(10, dtype=np.float32)
    steps = rosmo.Steps(observation, *(np.zeros(10) for _ in range(4)))
    starts = jnp.array([2, 9, 0, 0])  # two starts and padding
    windows = rosmo.sample_windows(jax.random.key(0), steps, starts, 2, 100, 4).observation
    assert {tuple(w) for w in np.asarray(windows).tolist()} == {(2, 3, 4, 5), (9, 0, 1, 2)}


def test_window_starts_are_whole_episodes_of_the_seed():
    is_last = np.zeros(60, bool)
    is_last[5::6] = True  # ten episodes of six steps
    starts, num_starts = rosmo.window_starts(is_last, 30.0, [0, 1, 2])
    assert num_starts.tolist() == [18, 18, 18]
    chosen = [set((row // 6).tolist()) for row in starts]
    assert all(len(c) == 3 for c in chosen)
    assert len({tuple(sorted(c)) for c in chosen}) > 1
    alone, _ = rosmo.window_starts(is_last, 30.0, [1])
    assert alone[0].tolist() == starts[1].tolist()
    everything, _ = rosmo.window_starts(is_last, 100.0, [0])
    assert everything[0].tolist() == list(range(60))
    with pytest.raises(SystemExit, match="leaves none"):
        rosmo.window_starts(is_last, 5.0, [0])


# Learning.


def test_learns_a_known_problem_from_random_data():
    """Two states; action 1 earns 1 in the first and moves on, action 2 earns 2 in the second."""
    rng = np.random.default_rng(0)
    action = rng.integers(0, 3, 3000).astype(np.int32)
    state = np.tile([0, 1, 2], 1000)
    reward = np.where((state == 0) & (action == 1), 1.0, 0.0)
    reward += np.where((state == 1) & (action == 2), 2.0, 0.0)
    is_last = state == 2
    observation = np.eye(3, dtype=np.float32)[state][:, None]
    steps = rosmo.Steps(observation, action, reward.astype(np.float32), is_last, is_last)
    args = dataclasses.replace(ARGS, learning_rate=0.01, target_update_every=50, batch_size=64)
    network = rosmo.make_network(3, args)
    states, metrics = helpers.train_seeds(rosmo, steps, args, network, [0], 600)
    params = jax.tree.map(lambda x: x[0], states.params)
    actions = rosmo.act(params, observation[:2], KEY, True, network, args)
    assert actions.tolist() == [1, 2]
    value = network.apply(
        params,
        network.apply(params, observation[:3], method="representation"),
        method="prediction",
    ).value_logits
    value = rosmo.to_scalar(value)
    assert value[1] == pytest.approx(2 / 3, abs=0.25)  # Eq. 8 values the policy of the data
    assert value[2] == pytest.approx(0.0, abs=0.1)  # terminal
    assert np.isfinite(metrics["losses/total"]).all()


def test_a_seed_learns_the_same_alone_and_among_others(catch_dataset):
    """Of bc_bsuite.py, which has the same functions and is the quickest."""
    args = bc.Args(dataset=catch_dataset, batch_size=16, data_percent=50.0, learning_rate=0.1)
    steps, network = bc.load_dataset(args), bc.make_network(3, args)
    both, _ = helpers.train_seeds(bc, steps, args, network, [0, 1], 20)
    alone, _ = helpers.train_seeds(bc, steps, args, network, [0], 20)
    for a, b in zip(jax.tree.leaves(both.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)
    kernels = both.params["params"]["Dense_0"]["kernel"]  # zero at first
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_starts_are_those_of_a_share_of_episodes_of_any_length():
    is_last = np.isin(np.arange(30), [1, 4, 9, 29])
    episode = np.cumsum(is_last) - is_last
    starts, numbers = rosmo.window_starts(is_last, 50.0, [*range(6)])
    for row, number in zip(starts, numbers, strict=True):
        chosen = np.unique(episode[row[:number]])
        assert len(chosen) == 2
        assert row[:number].tolist() == np.flatnonzero(np.isin(episode, chosen)).tolist()
    assert len(set(numbers.tolist())) > 1
    assert rosmo.window_starts(np.ones(100, bool), 29.0, [0])[1] == [29]  # 28.999999999999996
