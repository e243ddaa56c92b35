"""The losses of behavior cloning, CRR and CQL against naive loops and known answers."""

import dataclasses
import importlib
import itertools
import math
from collections import Counter
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import two_hot_cross_entropy
from scipy.special import logsumexp, softmax

import bc_bsuite as bc
import cql_bsuite as cql
import crr_bsuite as crr
import rosmo_bsuite as rosmo

pytestmark = pytest.mark.usefixtures("hurry")
NAMES = ("bc", "crr", "cql")
OBSERVATION = jnp.zeros((10, 5))


def random_batch(batch_size: int = 32):
    return helpers.random_steps(batch_size, 2)


@pytest.mark.parametrize(
    ("module", "widths"),
    [
        (bc, [(50, 64, 64, 32), (32, 32), (32, 3)]),
        (crr, [(50, 64, 64, 32), (32, 32), (32, 3), (32 + 3, 32, 256, 32), (32, 20)]),
        (cql, [(50, 64, 64, 32), (32, 32), (32, 3 * 20)]),
    ],
)
def test_networks_have_the_sizes_of_table_4(module, widths):
    args = module.Args()
    network = module.make_network(3, args)
    init = partial(module.init_state, network=network, observation=OBSERVATION, args=args)
    state = jax.eval_shape(init, jax.random.key(0))
    shapes = [x.shape for x in jax.tree.leaves(state.params) if x.ndim == 2]
    assert Counter(shapes) == Counter(pair for x in widths for pair in itertools.pairwise(x))


def test_behavior_cloning_against_a_loop():
    args = bc.Args()
    network = bc.make_network(3, args)
    params, batch = helpers.make_params(bc, network, 0), random_batch()
    loss, metrics = jax.jit(partial(bc.bc_loss, network=network))(params, batch)
    apply = jax.jit(network.apply)
    expected, hits, entropy = 0.0, 0, 0.0
    for i in range(32):
        logits = np.array(apply(params, batch.observation[i, 0]), float)
        entropy -= softmax(logits) @ np.log(softmax(logits)) / 32
        if not batch.is_last[i, 0]:
            expected -= math.log(softmax(logits)[batch.action[i, 0]]) / 32
            hits += logits.argmax() == batch.action[i, 0]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["charts/accuracy"] == pytest.approx(hits / 32)
    assert metrics["charts/policy_entropy"] == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("weight", ["exp", "binary"])
def test_crr_against_a_loop(weight):
    args = crr.Args(weight=weight, beta=0.5, discount=0.9)
    network = crr.make_network(3, args)
    params, target_params, batch = (
        helpers.make_params(crr, network, 0),
        helpers.make_params(crr, network, 1),
        random_batch(),
    )
    loss = jax.jit(partial(crr.crr_loss, network=network, args=args))
    total, metrics = loss(params, target_params, batch, jax.random.key(0))

    apply, to_scalar = jax.jit(network.apply), jax.jit(crr.to_scalar)

    def predict(params, observation):
        policy_logits, q_logits = apply(params, observation)
        return np.array(policy_logits, float), np.array(q_logits, float)

    critic_loss, policy_loss, weights, means = 0.0, 0.0, [], Counter()
    for i in range(32):
        action = batch.action[i, 0]
        logits, q_logits = predict(params, batch.observation[i, 0])
        next_logits, next_q_logits = predict(target_params, batch.observation[i, 1])
        next_value = softmax(next_logits) @ np.array(to_scalar(jnp.array(next_q_logits)))
        y = batch.reward[i, 0] + 0.9 * next_value * (not batch.is_terminal[i, 1])
        q = np.array(to_scalar(jnp.array(q_logits)))
        advantage = q[action] - softmax(logits) @ q
        w = min(math.exp(advantage / 0.5), 20) if weight == "exp" else float(advantage > 0)
        means["policy_entropy"] -= softmax(logits) @ np.log(softmax(logits)) / 32
        if not batch.is_last[i, 0]:
            critic_loss += two_hot_cross_entropy(y, q_logits[action]) / 32
            policy_loss -= w * math.log(softmax(logits)[action]) / 32
            weights.append(w)
            means.update(q=q[action] / 32, q_target=y / 32, advantage=advantage / 32)
    assert metrics["losses/critic"] == pytest.approx(critic_loss, rel=1e-4)
    assert metrics["losses/policy"] == pytest.approx(policy_loss, rel=1e-4)
    assert total == pytest.approx(critic_loss + policy_loss, rel=1e-4)
    means["weight"], means["weight_p95"] = sum(weights) / 32, np.percentile(weights, 95)
    for name, mean in means.items():
        assert metrics[f"charts/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-6), name


def test_crr_weights_have_one_axis_are_capped_and_gate_in_binary_form():
    advantage = jnp.array([-1000.0, -1.0, 0.0, 1.0, 3.0, 1000.0])
    weight = crr.regression_weight(advantage, crr.Args(beta=1.0))
    assert weight.shape == (6,)
    np.testing.assert_allclose(weight, [0, math.exp(-1), 1, math.e, 20, 20], rtol=1e-5)
    weight = crr.regression_weight(advantage, crr.Args(weight="binary"))
    assert weight.tolist() == [0, 0, 0, 1, 1, 1]


def test_crr_value_from_samples_approaches_the_exact_one():
    """With a policy that is far from uniform, and few actions do not do."""
    network = crr.make_network(3, crr.Args())
    params, batch = helpers.make_params(crr, network, 0, scale=0.2), random_batch()
    inputs = params, helpers.make_params(crr, network, 1, scale=0.2), batch, jax.random.key(0)
    losses = []
    for num_action_samples in (None, 4000, 1):
        args = crr.Args(num_action_samples=num_action_samples)
        loss = jax.jit(partial(crr.crr_loss, network=network, args=args))
        losses.append(float(loss(*inputs)[1]["losses/policy"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[2] != pytest.approx(losses[0], rel=0.01)


def test_the_weight_of_crr_carries_no_gradient_and_the_critic_sees_no_policy_loss():
    network = crr.make_network(3, crr.Args())
    params, target_params, batch = (
        helpers.make_params(crr, network, 0),
        helpers.make_params(crr, network, 1),
        random_batch(),
    )

    def policy_loss(params):
        inputs = params, target_params, batch, jax.random.key(0), network, crr.Args()
        return crr.crr_loss(*inputs)[1]["losses/policy"]

    gradient = jax.jit(jax.grad(policy_loss))(params)["params"]
    for name in ("g", "q"):
        assert all(not np.any(x) for x in jax.tree.leaves(gradient[name]))
    for name in ("h", "f", "policy"):
        assert any(np.any(x) for x in jax.tree.leaves(gradient[name]))


def test_cql_against_a_loop():
    args = cql.Args(cql_alpha=0.7, discount=0.9)
    network = cql.make_network(3, args)
    params, target_params, batch = (
        helpers.make_params(cql, network, 0),
        helpers.make_params(cql, network, 1),
        random_batch(),
    )
    loss = jax.jit(partial(cql.cql_loss, network=network, args=args))
    total, metrics = loss(params, target_params, batch)
    apply, to_scalar = jax.jit(network.apply), jax.jit(cql.to_scalar)
    td_loss, penalty, means, values = 0.0, 0.0, Counter(), []
    for i in range(32):
        action = batch.action[i, 0]
        logits = np.array(apply(params, batch.observation[i, 0]), float)
        q = np.array(to_scalar(jnp.array(logits)))
        next_q = to_scalar(apply(target_params, batch.observation[i, 1]))
        y = batch.reward[i, 0] + 0.9 * float(next_q.max()) * (not batch.is_terminal[i, 1])
        if not batch.is_last[i, 0]:
            td_loss += two_hot_cross_entropy(y, logits[action]) / 32
            penalty += 0.7 * (logsumexp(q) - q[action]) / 32
            means.update(q=q[action] / 32, q_target=y / 32, gap=(logsumexp(q) - q[action]) / 32)
            values += [*q]
    for name, mean in means.items():
        assert metrics[f"charts/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-6), name
    assert metrics["charts/q_min"] == pytest.approx(min(values), rel=1e-4)
    assert metrics["losses/td"] == pytest.approx(td_loss, rel=1e-4)
    assert metrics["losses/conservative"] == pytest.approx(penalty, rel=1e-3)
    assert total == pytest.approx(td_loss + penalty, rel=1e-3)


def test_conservative_gap_has_the_value_and_the_gradient_computed_by_hand():
    q = jnp.array([[2.0, 2.0, 2.0], [0.0, math.log(2.0), math.log(5.0)]])
    action = jnp.array([1, 1])
    gap = cql.conservative_gap(q, action)
    np.testing.assert_allclose(gap, [math.log(3), math.log(8) - math.log(2)], rtol=1e-6)
    gradient = jax.grad(lambda q: cql.conservative_gap(q, action).sum())(q)
    # softmax(q) - 1[a]: actions that were not logged are pushed down, too.
    expected = [[1 / 3, 1 / 3 - 1, 1 / 3], [1 / 8, 2 / 8 - 1, 5 / 8]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def two_state_problem():
    """Random play: action 1 earns 1 in the first state, action 2 earns 2 in the second.

    Each right action is drawn half of the time, so that imitation finds it as well.
    """
    rng = np.random.default_rng(0)
    state = np.tile([0, 1, 2], 1000)
    action = np.where(rng.random(3000) < 0.25, state + 1, rng.integers(0, 3, 3000)) % 3
    reward = 1.0 * ((state == 0) & (action == 1)) + 2.0 * ((state == 1) & (action == 2))
    observation = np.eye(3, dtype=np.float32)[state][:, None]
    last = state == 2
    return rosmo.Steps(observation, action.astype(np.int32), reward.astype(np.float32), last, last)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_problem(name):
    """Cloning imitates the data's policy; CRR and CQL improve on it."""
    script = importlib.import_module(f"{name}_bsuite")
    steps = two_state_problem()
    args = script.Args(learning_rate=3e-3 if name == "bc" else 0.01, batch_size=64)
    if name != "bc":  # so that the bootstrap moves within the test
        args = dataclasses.replace(args, target_update_every=50)
    if name == "cql":
        args = dataclasses.replace(args, cql_alpha=0.1)
    network = script.make_network(3, args)
    states, metrics = helpers.train_seeds(script, steps, args, network, [0], 600)
    params = jax.tree.map(lambda x: x[0], states.params)
    observation = jnp.repeat(steps.observation[:2], 3000, axis=0)
    actions = script.act(params, observation, jax.random.key(0), False, network, args)
    chosen = np.array(actions).reshape(2, 3000)
    right = np.mean(chosen == [[1], [2]], axis=1)
    greedy = script.act(params, steps.observation[:2], jax.random.key(0), True, network, args)
    assert greedy.tolist() == [1, 2]
    if name == "bc":
        np.testing.assert_allclose(right, 0.5, atol=0.08)
    else:
        assert (right > 0.6).all()
    assert np.isfinite(metrics["losses/total"]).all()


def shapes(tree) -> list:
    return [x.shape for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", NAMES)
def test_all_methods_have_the_representation_of_rosmo(name):
    def representation(module, observation, *action):
        args = module.Args(channels=8) if "atari" in module.__name__ else module.Args()
        network = module.make_network(3, args)
        params = jax.eval_shape(network.init, jax.random.key(0), observation, *action)["params"]
        names = [k for k in params if k in ("h", "Representation_0")]
        return shapes(params[names[0] if names else "MLP_1"])

    for domain, observation in (
        ("bsuite", OBSERVATION),
        ("atari", jnp.zeros((84, 84, 4), jnp.uint8)),
    ):
        ours = importlib.import_module(f"{name}_{domain}")
        theirs = importlib.import_module(f"rosmo_{domain}")
        expected = representation(theirs, observation, jnp.int32(0))
        assert len(expected) > 5
        assert representation(ours, observation) == expected


def test_cql_acts_at_random_with_the_probability_of_eval_epsilon():
    args = cql.Args(eval_epsilon=0.3)
    network = cql.make_network(3, args)
    params, observation = helpers.make_params(cql, network, 0), jnp.zeros((5000, 10, 5))
    best = cql.act(params, observation, jax.random.key(0), True, network, args)
    assert len(set(best.tolist())) == 1
    actions = cql.act(params, observation, jax.random.key(0), False, network, args)
    assert np.mean(np.array(actions) != best) == pytest.approx(0.2, abs=0.02)  # 0.3 · 2/3


@pytest.mark.parametrize("name", ["crr", "cql"])
def test_truncation_as_termination_makes_every_last_step_terminal(name):
    module, batch = importlib.import_module(f"{name}_bsuite"), random_batch()
    args = module.Args()
    cut = dataclasses.replace(args, truncation_as_termination=True)
    network = module.make_network(3, args)
    inputs = [helpers.make_params(module, network, seed) for seed in (0, 1)]
    ended = batch._replace(is_terminal=batch.is_last)
    key = [jax.random.key(0)] if name == "crr" else []

    def loss(batch, args):
        function = partial(getattr(module, f"{name}_loss"), network=network, args=args)
        return jax.jit(function)(*inputs, batch, *key)[0]

    assert loss(batch, cut) == loss(ended, args) != loss(batch, args)


@pytest.mark.parametrize(("name", "blocks"), [("bc", 12), ("cql", 12), ("crr", 14)])
def test_networks_on_atari_have_the_blocks_of_appendix_d21(name, blocks):
    module = importlib.import_module(f"{name}_atari")
    network = module.make_network(4, module.Args(channels=4))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((84, 84, 4), jnp.uint8))
    kernels = [x for x in jax.tree.leaves(shapes) if x.shape[:2] == (3, 3)]
    # Two in a block, two more in the representation, and one in CRR's critic.
    assert len(kernels) == 2 * blocks + 2 + (name == "crr")


def test_the_critic_of_crr_carries_states_on(monkeypatch):
    crr_atari = importlib.import_module("crr_atari")
    monkeypatch.setattr(crr_atari, "Head", lambda *_: lambda x: x)
    critic, state = crr_atari.Critic(4, 21, jnp.float32), jnp.ones((2, 3, 6, 6, 4))
    shapes = jax.eval_shape(critic.init, jax.random.key(0), state, jnp.eye(3))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    np.testing.assert_array_equal(critic.apply(nothing, state, jnp.eye(3)), state)
