"""The search of the MuZero Unplugged scripts against a naive one, and its place in the loss."""

import dataclasses
import difflib
import math
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

import muzero_unplugged_bsuite as muzero
import rosmo_bsuite as rosmo

pytestmark = pytest.mark.usefixtures("hurry")
ARGS = muzero.Args(env_id="catch", dynamics_hidden=16, unroll_steps=3, td_steps=2)
NETWORK = muzero.MuZeroNetwork(3, ARGS.num_bins, ARGS.dynamics_hidden, ARGS.dtype)
DISCOUNT, NUM_ACTIONS, NUM_NODES = 0.9, 3, 997


class Table:
    """A deterministic model whose states are node numbers, with predictions read from tables."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.reward, self.value = rng.normal(size=(2, NUM_NODES)).astype(np.float32)
        self.policy_logits = rng.normal(size=(NUM_NODES, NUM_ACTIONS)).astype(np.float32)

    def next(self, node, action):
        return (node * NUM_ACTIONS + action + 1) % NUM_NODES

    def apply(self, params, state, *action, method: str):
        node = state[..., 0].astype(jnp.int32)
        if method == "dynamics":
            return self.next(node, action[0])[..., None].astype(jnp.float32)
        logits = lambda x: jnp.log(muzero.two_hot(jnp.array(x)[node], 20))  # noqa: E731
        policy_logits = jnp.array(self.policy_logits)[node]
        return muzero.Prediction(policy_logits, logits(self.value), logits(self.reward))


class Node:
    def __init__(self, table: Table, number: int):
        logits = table.policy_logits[number].astype(float)
        self.number, self.prior = number, np.exp(logits) / np.exp(logits).sum()
        self.value, self.visits = float(table.value[number]), 1
        self.children = [None] * NUM_ACTIONS
        self.counts = np.zeros(NUM_ACTIONS, int)

    def q(self, table: Table, action: int) -> float:
        child = self.children[action]
        return float(table.reward[child.number]) + DISCOUNT * child.value


def naive_search(table: Table, number: int, num_simulations: int, max_depth: int):
    """Plain recursive search with Eq. 2's rule; Q is scaled to [0, 1] among a node's values."""
    root = Node(table, number)

    def select(node: Node) -> int:
        visited = [a for a in range(NUM_ACTIONS) if node.children[a]]
        q = {a: node.q(table, a) for a in visited}
        low, high = min([node.value, *q.values()]), max([node.value, *q.values()])
        exploration = 1.25 + math.log((node.visits + 19652 + 1) / 19652)
        scores = []
        for a in range(NUM_ACTIONS):
            scaled = (q.get(a, low) - low) / max(high - low, 1e-8)
            bonus = node.prior[a] * math.sqrt(node.visits) / (1 + node.counts[a])
            scores.append(scaled + exploration * bonus)
        return int(np.argmax(scores))

    def simulate(node: Node, depth: int) -> float:
        """Returns the return from the node, and updates the mean of its returns."""
        action = select(node)
        child = node.children[action]
        node.counts[action] += 1
        if child is None:
            child = node.children[action] = Node(table, int(table.next(node.number, action)))
            value = child.value
        elif depth + 1 == max_depth:  # evaluated once more
            value = float(table.value[child.number])
            child.value = (child.value * child.visits + value) / (child.visits + 1)
            child.visits += 1
        else:
            value = simulate(child, depth + 1)
        value = float(table.reward[child.number]) + DISCOUNT * value
        node.value = (node.value * node.visits + value) / (node.visits + 1)
        node.visits += 1
        return value

    for _ in range(num_simulations):
        simulate(root, 0)
    q = [root.q(table, a) if root.children[a] else float("nan") for a in range(NUM_ACTIONS)]
    return root.counts, np.array(q)


def search(nodes, noise: float = 0.0, table: Table | None = None, **change):
    """The script's search below nodes [...]."""
    table, args = table or Table(), dataclasses.replace(ARGS, discount=DISCOUNT, **change)

    @jax.jit
    def run(state):
        prediction = table.apply(None, state, method="prediction")
        return muzero.search(None, state, prediction, jax.random.key(0), noise, table, args)

    return run(jnp.array(nodes, jnp.float32)[..., None])


@pytest.mark.parametrize(("num_simulations", "max_depth"), [(4, None), (20, None), (20, 2)])
def test_visits_and_root_values_against_a_naive_search(num_simulations, max_depth):
    nodes = np.arange(12).reshape(4, 3)
    options = {"num_simulations": num_simulations, "max_depth": max_depth}
    policy, value = search(nodes, **options)
    assert policy.shape == (4, 3, NUM_ACTIONS)
    depths = max_depth or num_simulations
    for index, node in np.ndenumerate(nodes):
        counts, q = naive_search(Table(), node, num_simulations, depths)
        np.testing.assert_allclose(policy[index], counts / num_simulations, atol=1e-6)
        expected = np.nansum(q * counts) / num_simulations  # the sum in Eq. 3
        assert value[index] == pytest.approx(expected, abs=1e-3)


def test_a_search_of_depth_one_is_the_enumeration_of_actions():
    table, nodes = Table(), np.arange(20)
    policy, value = search(nodes, num_simulations=100, max_depth=1)
    after = table.next(nodes[:, None], np.arange(NUM_ACTIONS))
    q = table.reward[after] + DISCOUNT * table.value[after]
    visited = np.array(policy) > 0
    assert visited.mean() > 0.6
    np.testing.assert_allclose(value, (policy * q).sum(axis=1), atol=1e-3)
    improved, _ = search(nodes, num_simulations=100, max_depth=1, policy_target="mpo")
    q = np.where(visited, q, table.value[nodes][:, None])
    weight = np.exp(table.policy_logits[nodes].astype(float) + q / 0.1)
    np.testing.assert_allclose(improved, weight / weight.sum(axis=1, keepdims=True), atol=1e-2)


def test_mpo_target_against_brute_force_where_actions_were_not_visited():
    table, nodes = Table(), np.arange(20)
    policy, _ = search(nodes, num_simulations=2, policy_target="mpo", mpo_temperature=0.5)
    some_unvisited = False
    for node in nodes:
        counts, q = naive_search(table, node, 2, 2)
        some_unvisited |= (counts == 0).any()
        q = np.where(counts > 0, q, table.value[node])
        weight = np.exp(table.policy_logits[node] + q / 0.5)
        np.testing.assert_allclose(policy[node], weight / weight.sum(), atol=2e-3)
    assert some_unvisited


def test_the_prior_of_the_root_is_mixed_with_noise():
    """One simulation visits the action of the highest mixed prior."""
    table = Table()
    table.policy_logits[:] = np.log([0.5, 0.3, 0.2])
    policy, _ = search(np.zeros(30_000), noise=0.25, num_simulations=1, table=table)
    noise = np.random.default_rng(0).dirichlet(np.full(3, 0.3), 30_000)
    mixed = 0.75 * np.array([0.5, 0.3, 0.2]) + 0.25 * noise
    expected = np.bincount(mixed.argmax(axis=1)) / 30_000
    assert 0.05 < expected[1] < 0.5
    np.testing.assert_allclose(policy.mean(axis=0), expected, atol=0.01)


def test_a_prior_of_noise_alone_is_drawn_for_each_root():
    """With noise 1 and one simulation the visit goes where the noise is highest: by symmetry."""
    policy, _ = search(np.arange(30_000), noise=1.0, num_simulations=1)
    assert set(np.unique(policy)) == {0.0, 1.0}
    np.testing.assert_allclose(policy.mean(axis=0), 1 / 3, atol=0.01)


def test_ties_are_broken_at_random():
    """A model that says the same of everything, as a new network."""
    table = Table()
    table.reward[:], table.value[:] = 0, 0
    table.policy_logits[:] = 0
    policy, _ = search(np.zeros(30_000), num_simulations=1, table=table)
    np.testing.assert_allclose(policy.mean(axis=0), 1 / 3, atol=0.03)
    table.policy_logits[:, 1] = 1e-4  # no tie: what breaks ties is smaller
    policy, _ = search(np.zeros(30_000), num_simulations=1, table=table)
    assert (policy.argmax(axis=1) == 1).all()


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.9])
def test_log_gamma_has_the_moments_and_quantiles_of_the_distribution(alpha):
    x = np.array(
        jax.jit(muzero.log_gamma, static_argnums=(1, 2))(jax.random.key(0), alpha, (10**6,))
    )
    assert np.isfinite(x).all()
    expected = stats.loggamma(alpha)
    assert x.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / 1000)
    assert x.var() == pytest.approx(expected.var(), rel=0.02)
    # A rank's standard error is at most half a thousandth.
    ranks = np.array([1e-4, 1e-3, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 0.9999])
    error = np.mean(x[:, None] < expected.ppf(ranks), axis=0) - ranks
    assert (np.abs(error) < 5 * np.sqrt(ranks * (1 - ranks) / len(x))).all()
    assert stats.kstest(x[:100_000], expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(1, 2), (1152, 3), (50_000, 18)])
def test_normalised_gammas_are_dirichlet(shape):
    """Each share is Beta(α, (A - 1) α); shares of a draw have the covariance of Dirichlet(α)."""
    num_draws = max(1, 30_000 // shape[0])
    keys = jax.random.split(jax.random.key(1), num_draws)
    draw = jax.jit(jax.vmap(lambda key: jax.nn.softmax(muzero.log_gamma(key, 0.3, shape))))
    x = np.array(draw(keys), float).reshape(-1, shape[-1])
    expected = stats.dirichlet(np.full(shape[-1], 0.3))
    np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x.mean(axis=0), expected.mean(), atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), expected.cov(), atol=0.005)
    for share in x.T[:3]:
        beta = stats.beta(0.3, 0.3 * (shape[-1] - 1))
        assert stats.kstest(share, beta.cdf).pvalue > 1e-3


def random_params(seed: int):
    return helpers.make_params(muzero, NETWORK, seed)


def random_batch(args) -> muzero.Steps:
    return helpers.random_steps(16, muzero.window_length(args))


def test_with_the_operator_of_rosmo_the_losses_are_those_of_rosmo(monkeypatch):
    def look_ahead(params, state, prediction, key, noise, network, args):
        candidates = jnp.broadcast_to(jnp.arange(3), prediction.policy_logits.shape)
        value = muzero.to_scalar(prediction.value_logits)
        q = rosmo.look_ahead(params, state, candidates, network, args.discount)
        return rosmo.policy_target(prediction.policy_logits, q - value[..., None]), value

    monkeypatch.setattr(muzero, "search", look_ahead)
    shared = {
        f.name: getattr(ARGS, f.name)
        for f in dataclasses.fields(rosmo.Args)
        if hasattr(ARGS, f.name)
    }
    rosmo_args = rosmo.Args(**shared, behavior_coef=0.0)
    inputs = random_params(0), random_params(1), random_batch(ARGS), jax.random.key(0)
    total, ours = jax.jit(partial(muzero.muzero_loss, network=NETWORK, args=ARGS))(*inputs)
    expected, theirs = jax.jit(partial(rosmo.rosmo_loss, network=NETWORK, args=rosmo_args))(*inputs)
    assert total == pytest.approx(float(expected), rel=1e-5)
    for name in ours.keys() & theirs.keys():
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5), name


@pytest.mark.parametrize(("unroll_steps", "td_steps", "roots"), [(5, 3, 9), (1, 5, 4), (1, 1, 3)])
def test_only_roots_that_a_target_needs_are_searched(monkeypatch, unroll_steps, td_steps, roots):
    args = dataclasses.replace(ARGS, unroll_steps=unroll_steps, td_steps=td_steps)
    searched, original = [], muzero.search

    def spy(params, state, *more):
        searched.append(state.shape)
        return original(params, state, *more)

    monkeypatch.setattr(muzero, "search", spy)
    loss = partial(muzero.muzero_loss, network=NETWORK, args=args)
    params = random_params(0)
    jax.eval_shape(loss, params, params, random_batch(args), jax.random.key(0))
    assert searched == [(16, roots, 32)]


def test_the_states_of_a_short_unroll_are_searched_at_their_places(monkeypatch):
    """Those of K + 1 = 2 policy targets and, n = 5 steps later, of two bootstrap values."""
    args = dataclasses.replace(ARGS, unroll_steps=1, td_steps=5, discount=0.5)

    def search(params, state, prediction, key, noise, network, args):
        return jax.nn.softmax(state[..., :3]), state.mean(axis=-1) + jnp.arange(4)

    monkeypatch.setattr(muzero, "search", search)
    batch = random_batch(args)
    never = np.zeros_like(batch.is_last)
    batch = batch._replace(reward=np.ones_like(batch.reward), is_last=never, is_terminal=never)
    loss = jax.jit(partial(muzero.muzero_loss, network=NETWORK, args=args))
    _, metrics = loss(random_params(0), random_params(1), batch, jax.random.key(0))
    searched = batch.observation[:, [0, 1, 5, 6]]
    p, value = search(
        None, NETWORK.apply(random_params(1), searched, method="representation"), *5 * [0]
    )
    expected = 1 + 0.5 + 0.25 + 0.125 + 0.0625 + 0.5**5 * value[:, 2:].mean()
    assert metrics["charts/value_target"] == pytest.approx(float(expected), rel=1e-5)
    entropy = -jnp.sum(p * jnp.log(p), axis=-1)[:, :2].mean()
    assert metrics["charts/target_entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_the_loss_follows_the_visits_and_the_searched_values(monkeypatch):
    """A search that always says the same is found again in the targets."""
    args = dataclasses.replace(ARGS, unroll_steps=1, td_steps=1, discount=0.5)
    p, noises = jnp.array([0.2, 0.3, 0.5]), []

    def constant(params, state, prediction, key, noise, network, args):
        noises.append(noise)
        shape = state.shape[:-1]
        return jnp.broadcast_to(p, (*shape, 3)), jnp.full(shape, 8.0)

    monkeypatch.setattr(muzero, "search", constant)
    ones = np.ones((4, 3), np.float32)
    batch = muzero.Steps(
        np.zeros((4, 3, 10, 5), np.float32), ones.astype(np.int32), ones, ones > 1, ones > 1
    )
    zero = jax.tree.map(jnp.zeros_like, random_params(0))
    heads = {name: dict(zero["params"][name]) for name in ("policy", "value")}
    heads["policy"]["bias"] = jnp.log(jnp.array([0.25, 0.25, 0.5]))
    heads["value"]["bias"] = 50 * muzero.two_hot(2.0, args.num_bins)
    params = {"params": zero["params"] | heads}
    loss = jax.jit(partial(muzero.muzero_loss, network=NETWORK, args=args))
    _, metrics = loss(params, zero, batch, jax.random.key(0))
    assert noises == [0.25]  # the share of Dirichlet noise
    assert metrics["charts/value_target"] == pytest.approx(1 + 0.5 * 8)
    assert metrics["losses/policy"] == pytest.approx(1.5 * math.log(2), rel=1e-5)
    assert metrics["charts/policy_entropy"] == pytest.approx(1.5 * math.log(2), rel=1e-5)
    middle = jax.nn.softmax(heads["value"]["bias"])
    value = float(muzero.to_scalar(jnp.log(middle)))
    assert metrics["charts/value"] == pytest.approx(value, rel=1e-5)
    assert value > 1
    entropy = -float(jnp.sum(p * jnp.log(p)))
    assert metrics["charts/target_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_acting_samples_the_policy_of_the_search_or_takes_its_most_probable_action(monkeypatch):
    policy = jnp.array([0.1, 0.0, 0.9])
    seen = []

    def constant(params, state, prediction, key, noise, network, args):
        seen.append(noise)
        return jnp.broadcast_to(policy, (len(state), 3)), None

    monkeypatch.setattr(muzero, "search", constant)
    args = dataclasses.replace(ARGS, eval_dirichlet_fraction=0.125)
    inputs = random_params(0), jnp.zeros((2000, 10, 5)), jax.random.key(0)
    assert (muzero.act(*inputs, True, NETWORK, args) == 2).all()
    share = np.bincount(muzero.act(*inputs, False, NETWORK, args), minlength=3) / 2000
    np.testing.assert_allclose(share, policy, atol=0.03)
    assert seen == [0.125, 0.125]


@pytest.mark.parametrize("domain", ["atari", "bsuite"])
def test_the_scripts_differ_from_their_siblings_in_few_lines(domain):
    """Both sides counted, as in the output of diff."""
    texts = [
        (ROOT / f"{name}_{domain}.py").read_text().splitlines()
        for name in ("rosmo", "muzero_unplugged")
    ]
    changes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    changed = sum(b - a + d - c for tag, a, b, c, d in changes if tag != "equal")
    assert changed < 200


def test_learns_a_known_problem_from_random_data():
    """Two states; action 1 earns 1 in the first and moves on, action 2 earns 2 in the second."""
    rng = np.random.default_rng(0)
    action = rng.integers(0, 3, 3000).astype(np.int32)
    state = np.tile([0, 1, 2], 1000)
    reward = 1.0 * ((state == 0) & (action == 1)) + 2.0 * ((state == 1) & (action == 2))
    observation = np.eye(3, dtype=np.float32)[state][:, None]
    steps = muzero.Steps(observation, action, reward.astype(np.float32), state == 2, state == 2)
    args = dataclasses.replace(ARGS, learning_rate=0.01, target_update_every=50, batch_size=32)
    states, metrics = helpers.train_seeds(muzero, steps, args, NETWORK, [0], 600)
    params = jax.tree.map(lambda x: x[0], states.params)
    actions = muzero.act(params, observation[:2], jax.random.key(0), True, NETWORK, args)
    assert actions.tolist() == [1, 2]
    assert np.isfinite(metrics["losses/total"]).all()


def test_the_prior_of_mpo_is_without_noise():
    options = {"policy_target": "mpo", "mpo_temperature": 1e9}  # so that the prior is left alone
    policy, _ = search(np.arange(20), noise=1.0, num_simulations=2, **options)
    np.testing.assert_allclose(policy, jax.nn.softmax(Table().policy_logits[:20]), atol=1e-5)
