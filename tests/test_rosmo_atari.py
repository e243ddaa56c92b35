"""The network, loss and update of rosmo_atari.py; test_rosmo_bsuite.py has what both share."""

import itertools
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rosmo_atari as rosmo

pytestmark = pytest.mark.usefixtures("hurry")
ARGS = rosmo.Args(channels=4, num_bins=21, unroll_steps=1, td_steps=1, batch_size=4)
NETWORK = rosmo.MuZeroNetwork(4, ARGS.num_bins, ARGS.channels, jnp.dtype("float32"))
apply_network = jax.jit(NETWORK.apply, static_argnames="method")
to_scalar = jax.jit(rosmo.to_scalar)


random_params = partial(helpers.make_params, rosmo, NETWORK, scale=0.05)


@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 6), (16, 6, 4)])
def test_values_are_exact_where_the_bins_balance_and_keep_small_differences(shape):
    """Else rounding decides which actions have an advantage while the network knows little."""
    assert not to_scalar(jnp.zeros((*shape, 601))).any()
    rng = np.random.default_rng(0)
    logits = (1e-3 * rng.normal(size=(*shape, 601))).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    mean = (p * np.arange(-300, 301)).sum(axis=-1) / p.sum(axis=-1)
    exact = np.sign(mean) * (((np.sqrt(1 + 0.004 * (abs(mean) + 1.001)) - 1) / 0.002) ** 2 - 1)
    np.testing.assert_allclose(to_scalar(logits), exact, atol=2e-6)


def test_network_has_the_shapes_and_sizes_of_appendix_d21():
    network = rosmo.MuZeroNetwork(9, 601, 64, jnp.dtype("float32"))
    shapes = jax.eval_shape(
        lambda key: network.init(key, jnp.zeros((84, 84, 4), jnp.uint8), jnp.int32(0)),
        jax.random.key(0),
    )
    state = jax.eval_shape(
        lambda p: network.apply(p, jnp.zeros((2, 3, 84, 84, 4)), method="representation"), shapes
    )
    assert state.shape == (2, 3, 6, 6, 64)
    prediction = jax.eval_shape(
        lambda p: network.apply(p, jnp.zeros((2, 6, 6, 64)), method="prediction"), shapes
    )
    assert [x.shape for x in prediction] == [(2, 9), (2, 601), (2, 601)]
    assert all(x.dtype == jnp.float32 for x in prediction)

    def convolution(inputs, outputs, kernel=3):
        return kernel**2 * inputs * outputs

    def block(channels):
        return 2 * convolution(channels, channels) + 4 * channels

    def head(outputs):
        dense = 36 * 128 * 128 + 128 * 128 + 128 * outputs + outputs
        return 2 * 64 + convolution(64, 128, kernel=1) + 2 * 128 + dense + 2 * 2 * 128

    expected = {
        "h": convolution(4, 32) + block(32) + convolution(32, 64) + 9 * block(64),
        "g": 2 * 64 + convolution(64 + 9, 64) + 2 * block(64),
        "f_0": block(64),
        "f_1": block(64),
        "policy": head(9),
        "value": head(601),
        "reward": head(601),
    }
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes["params"].items()}
    assert sizes == expected


def test_the_representation_pools_before_the_seventh_and_the_sixth_last_block():
    h, observation = rosmo.Representation(4, jnp.dtype("float32")), jnp.zeros((84, 84, 4))

    def outputs(key):
        params = h.init(key, observation)
        return h.apply(params, observation, capture_intermediates=True)[1]["intermediates"]

    outputs = jax.eval_shape(outputs, jax.random.key(0))
    shapes = [outputs[f"ResidualBlock_{i}"]["__call__"][0].shape for i in range(10)]
    assert shapes == [(42, 42, 2)] + 2 * [(21, 21, 4)] + [(11, 11, 4)] + 6 * [(6, 6, 4)]


def test_observations_are_scaled_states_carried_on_and_rewards_alone_read_from_states(monkeypatch):
    params, white = random_params(0), jnp.full((84, 84, 4), 255, jnp.uint8)
    h, options = params["params"]["h"], {"capture_intermediates": True}
    with monkeypatch.context() as patch:
        helpers.without_blocks(patch, "rosmo_atari")  # behind the first convolution
        representation = rosmo.Representation(ARGS.channels, jnp.dtype("float32"))
        outputs = representation.apply({"params": h}, white, **options)[1]["intermediates"]
    first, kernel = outputs["Conv_0"]["__call__"][0][20, 20], h["Conv_0"]["kernel"]
    np.testing.assert_allclose(first, kernel.sum(axis=(0, 1, 2)), rtol=1e-3, atol=1e-5)
    state = np.random.default_rng(0).normal(size=(6, 6, 4)).astype(np.float32)
    nothing = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(apply_network(nothing, state, 1, method="dynamics"), state)
    blind = {name: nothing["params"][name] for name in ("f_0", "f_1")}
    changed = {"params": params["params"] | jax.tree.map(lambda x: x + 1, blind)}
    before, after = (apply_network(p, state, method="prediction") for p in (params, changed))
    np.testing.assert_array_equal(before.reward_logits, after.reward_logits)
    assert np.abs(before.value_logits - after.value_logits).max() > 1e-3
    assert np.abs(before.policy_logits - after.policy_logits).max() > 1e-3


def test_a_head_against_numpy():
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2)).astype(np.float32)
    head = rosmo.Head(2, 3, jnp.dtype("float32"))
    params = helpers.with_noise(head.init(jax.random.key(0), x), 0)["params"]

    def activated(y, i, axes):
        return np.maximum(helpers.layer_norm(y, axes, **params[f"LayerNorm_{i}"]), 0)

    y = activated(x, 0, (1, 2, 3)) @ params["Conv_0"]["kernel"][0, 0]
    y = activated(y, 1, (1, 2, 3)).reshape(5, -1)
    for i in range(2):
        y = activated(y @ params[f"Dense_{i}"]["kernel"], i + 2, 1)
    expected = y @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-4)


def test_the_dynamics_adds_the_state_to_what_it_makes_of_the_normalised_one(monkeypatch):
    helpers.without_blocks(monkeypatch, "rosmo_atari")
    state, action = np.random.default_rng(0).normal(size=(6, 6, 4)), jnp.eye(3)[0]
    kernel = np.zeros((3, 3, 4 + 3, 4), np.float32)
    kernel[1, 1, range(4), range(4)] = 1  # the convolution changes nothing
    g = rosmo.Dynamics(4, jnp.dtype("float32"))
    params = g.init(jax.random.key(0), state, action)["params"] | {"Conv_0": {"kernel": kernel}}
    expected = state + np.maximum(helpers.layer_norm(state, (0, 1, 2)), 0)
    np.testing.assert_allclose(g.apply({"params": params}, state, action), expected, atol=1e-4)


def test_residual_block_is_pre_activation_with_layer_normalisation():
    """Against the definition, with NumPy and SciPy."""
    from scipy.signal import correlate2d

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 5, 2)).astype(np.float32)
    block = rosmo.ResidualBlock(2, jnp.dtype("float32"))
    params = block.init(jax.random.key(0), x)
    y = x[0]
    for i in range(2):
        y = np.maximum((y - y.mean()) / np.sqrt(y.var() + 1e-5), 0)
        kernel = np.asarray(params["params"][f"Conv_{i}"]["kernel"])
        y = np.stack(
            [
                sum(correlate2d(y[..., c], kernel[:, :, c, o], mode="same") for c in range(2))
                for o in range(2)
            ],
            axis=-1,
        )
    np.testing.assert_allclose(block.apply(params, x)[0], x[0] + y, rtol=1e-3, atol=1e-4)


def test_average_pool_is_the_mean_of_what_lies_inside():
    x = np.random.default_rng(0).normal(size=(2, 11, 11, 3)).astype(np.float32)
    starts = np.arange(-1, 11, 2)  # of windows of three
    inside = [range(max(start, 0), min(start + 3, 11)) for start in starts]
    expected = [[x[:, rows][:, :, columns].mean((1, 2)) for columns in inside] for rows in inside]
    expected = np.moveaxis(np.asarray(expected), 2, 0)
    np.testing.assert_allclose(rosmo.average_pool(x), expected, rtol=1e-5, atol=1e-6)
    many = jnp.ones((2, 3, 21, 21, 8))
    assert rosmo.average_pool(many).shape == (2, 3, 11, 11, 8)
    # The numbers of what lies inside have no batch axes: XLA would fold a large constant.
    program = jax.make_jaxpr(rosmo.average_pool)(many)
    made = [x for x in program.eqns if x.primitive.name == "broadcast_in_dim"]
    assert max(x.outvars[0].aval.size for x in made) == 21 * 21


def test_dynamics_depends_on_the_action_everywhere():
    params, state = random_params(0), jnp.ones((6, 6, ARGS.channels))
    after = [apply_network(params, state, action, method="dynamics") for action in range(4)]
    for a, b in itertools.combinations(after, 2):
        assert (np.abs(a - b).max(axis=-1) > 0).all()


def test_look_ahead_is_the_reward_and_the_discounted_value_of_each_action():
    params, state = random_params(0), np.random.default_rng(0).normal(size=(2, 3, 6, 6, 4))
    candidates = np.random.default_rng(1).integers(0, 4, (2, 3, 5))
    q = jax.jit(partial(rosmo.look_ahead, network=NETWORK, discount=0.9))(params, state, candidates)
    for i in range(5):
        after = apply_network(params, state, candidates[..., i], method="dynamics")
        after = apply_network(params, after, method="prediction")
        expected = to_scalar(after.reward_logits) + 0.9 * to_scalar(after.value_logits)
        np.testing.assert_allclose(q[..., i], expected, rtol=1e-3, atol=1e-4)


def test_updates_reach_every_parameter(monkeypatch):
    """Also those of heads, which are zero at first: both sides of every gradient must flow.

    Through the blocks of the representation it does in test_morel.py.
    """
    helpers.with_small_representation(monkeypatch, "rosmo_atari")
    network = rosmo.MuZeroNetwork(5, ARGS.num_bins, ARGS.channels, jnp.dtype("float32"))
    params, target_params = (helpers.make_params(rosmo, network, i, scale=0.05) for i in range(2))
    opt_state = rosmo.make_optimizer(ARGS).init(params)
    state = rosmo.TrainState(params, target_params, opt_state, jnp.int32(0))
    batch = helpers.random_batch(4, rosmo.window_length(ARGS), num_actions=5)
    state, metrics = rosmo.update(state, jax.random.key(1), batch, network, ARGS)
    gradient = optax.tree_utils.tree_get(state.opt_state, "mu")  # a tenth of it
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    clipped = 10 * optax.tree.norm(gradient)
    assert clipped == pytest.approx(min(float(metrics["charts/grad_norm"]), 5.0), rel=1e-3)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    network = rosmo.MuZeroNetwork(4, 21, 4, jnp.dtype("bfloat16"))
    observation = jnp.zeros((84, 84, 4), jnp.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), observation, jnp.int32(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    state = jax.eval_shape(lambda p: network.apply(p, observation, method="representation"), params)
    assert state.dtype == jnp.bfloat16
    output = jax.eval_shape(network.apply, params, observation, jnp.int32(0))
    assert {x.dtype for x in output} == {jnp.dtype("float32")}
