"""What every script does in an update around its loss, in place of which stands a simple one."""

import dataclasses
import importlib

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rosmo_bsuite

pytestmark = pytest.mark.usefixtures("hurry")
NAMES = [f"{name}_{domain}" for name in helpers.LOSSES for domain in ("atari", "bsuite")]
LOSSES = helpers.LOSSES | {"combo": "combo_loss"}
UPDATES = [*NAMES, "combo_atari"]
DRAWS = [name for name in NAMES if not name.startswith(("bc", "cql"))]  # at random in the loss


@pytest.fixture
def simple(request, monkeypatch):
    """A script whose loss has the gradient `scale`, and a state."""
    module = importlib.import_module(request.param)

    def loss(params, *inputs):
        keys = [x for x in inputs if hasattr(x, "dtype") and x.dtype == jax.random.key(0).dtype]
        drawn = jax.random.uniform(keys[0]) if keys else 0.0
        (scale,) = (x for x in inputs if getattr(x, "dtype", None) == jnp.float32)
        return scale * params["x"].sum() + params["y"].sum(), {"drawn": drawn}

    monkeypatch.setattr(module, LOSSES[request.param.rsplit("_", 1)[0]], loss)
    _, args = helpers.script_and_args(request.param, target_update_every=3, learning_rate=0.1)
    params = {"x": jnp.ones((2, 2)), "y": jnp.ones(3)}
    fields = {"params": params, "opt_state": module.make_optimizer(args).init(params)}
    fields |= {"target_params": jax.tree.map(jnp.zeros_like, params), "step": jnp.int32(0)}
    fields |= {"rollouts": None, "world_model_crc32": jnp.uint32(0)}  # of COMBO
    names = module.TrainState._fields
    return module, args, module.TrainState(**{name: fields[name] for name in names})


@pytest.mark.parametrize("simple", UPDATES, indirect=True)
def test_updates_are_counted_and_copied_to_the_target_on_time(simple):
    module, args, state = simple
    before, key = 0, jax.random.key(1)  # the target's first parameters
    for i in range(1, 8):
        state, metrics = module.update(state, key, jnp.float32(1), None, args)
        assert state.step == i
        assert metrics["charts/grad_norm"] == pytest.approx(7**0.5)
        if hasattr(state, "target_params"):
            target = np.asarray(state.target_params["x"])
            copied = (target == np.asarray(state.params["x"])).all()
            assert copied == (i % 3 == 0), i
            assert copied or (target == before).all()
            before = target
    assert optax.tree_utils.tree_get(state.opt_state, "mu")["x"].max() > 0
    assert (np.asarray(state.params["x"]) < 1).all()


@pytest.mark.parametrize("simple", [x for x in DRAWS if x.endswith("_atari")], indirect=True)
def test_every_step_draws_anew_and_a_resumed_one_the_same(simple):
    """On BSuite the key of a step comes from `update_seeds`."""
    module, args, state = simple
    drawn = []
    for step in (0, 1, 2, 1):
        fresh = jax.tree.map(jnp.copy, state._replace(step=jnp.int32(step)))
        _, metrics = module.update(fresh, jax.random.key(1), jnp.float32(1), None, args)
        drawn.append(float(metrics["drawn"]))
    assert len(set(drawn)) == 3
    assert drawn[1] == drawn[3]


@pytest.fixture
def counting(monkeypatch):
    """BSuite's batches and keys instead of updates: metrics with what each update was given."""

    def update(state, key, batch, network, args):
        values = {"first": batch.observation[:, 0].sum(), "drawn": jax.random.uniform(key)}
        values |= {"windows": jnp.float32(len(batch.action)), "steps": state.step * 1.0}
        return state._replace(step=state.step + 1), values

    monkeypatch.setattr(rosmo_bsuite, "update", update)
    args = rosmo_bsuite.Args(batch_size=8)
    is_last = np.arange(60) % 6 == 5
    observation = 2.0 ** (np.arange(60, dtype=np.float32) % 16)
    zeros = np.zeros(60, np.float32)
    steps = rosmo_bsuite.Steps(observation, zeros.astype(int), zeros, is_last, is_last)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(rosmo_bsuite.AxisType.Auto,))
    by_device = rosmo_bsuite.NamedSharding(mesh, rosmo_bsuite.P("data"))
    states = rosmo_bsuite.TrainState(None, None, None, jnp.zeros(2, jnp.int32))
    keys = jnp.stack([jax.random.key(seed) for seed in range(2)])
    data = keys, steps, *rosmo_bsuite.window_starts(is_last, 100.0, [0, 1])
    zeros = {name: jnp.zeros(2) for name in ("first", "drawn", "windows", "steps")}

    def train(num_updates, states, sums=zeros):
        return rosmo_bsuite.train(num_updates, states, sums, data, None, args, by_device)

    return train, states


def test_every_seed_and_every_step_of_bsuite_draws_its_own(counting):
    train, states = counting
    rows = []
    for _ in range(4):
        states, sums = train(1, states)
        rows.append({name: np.asarray(x).tolist() for name, x in sums.items()})
    for name in ("first", "drawn"):
        values = [x for row in rows for x in row[name]]
        assert len(set(values)) == 8, name
    assert [row["windows"] for row in rows] == [[8, 8]] * 4
    assert [row["steps"] for row in rows] == [[i, i] for i in range(4)]
    again = train(1, states._replace(step=jnp.full(2, 2, jnp.int32)))[1]
    assert again["first"].tolist() == rows[2]["first"]
    assert again["drawn"].tolist() == rows[2]["drawn"]


def test_several_updates_are_one_after_another_and_metrics_their_sums(counting):
    train, states = counting
    at_once, sums = train(4, states)
    states, first = train(2, states)
    states, apart = train(2, states, first)
    assert states.step.tolist() == at_once.step.tolist() == [4, 4]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), sums, apart))
    assert sums["steps"].tolist() == [6, 6]


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_clips_decays_and_changes_its_rate_as_the_authors(name, monkeypatch):
    module, calls = importlib.import_module(name), []
    with monkeypatch.context() as patch:
        patch.setattr(optax, "adamw", lambda r, **o: calls.append((r, o)) or optax.identity())
        optimizer = module.make_optimizer(module.Args())
    ((rate, options),) = calls
    rates = [float(rate(step)) for step in (0, 500, 1_000, 100_999, 101_000, 201_000)]
    assert rates == pytest.approx([0, 3.5e-4, 7e-4, 7e-4, 7e-5, 7e-6], rel=1e-4)
    assert options["weight_decay"] == 1e-4
    large = {"x": jnp.full(4, 50.0)}
    clipped, _ = optimizer.update(large, optimizer.init(large))
    assert optax.tree.norm(clipped) == pytest.approx(5)
    # The decay spares scales and offsets.
    args = dataclasses.replace(module.Args(), weight_decay=0.5)
    optimizer = module.make_optimizer(args)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):  # the first learning rate of the warm-up is zero
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert (updates["kernel"] < 0).all()
    assert (updates["bias"] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_begins_with_the_weights_of_the_authors(name, monkeypatch):
    """Truncated normals of standard deviation √0.774 / √fan_in, heads of zeros, ε = 1e-5."""
    if name.endswith("_atari") and name != "rosmo_atari":
        helpers.without_blocks(monkeypatch, name)
    module, args = helpers.script_and_args(name, channels=16)
    network, epsilons = module.make_network(3, args), set()

    def note(call, arguments, keywords, context):
        if isinstance(context.module, nn.LayerNorm):
            epsilons.add(context.module.epsilon)
        return call(*arguments, **keywords)

    inputs = [] if name.endswith("_atari") else [jnp.zeros((10, 5))]
    with nn.intercept_methods(note):
        init = jax.jit(lambda key: module.init_state(key, network, *inputs, args))
        state = init(jax.random.key(0))
    assert epsilons == ({1e-5} if name.endswith("_atari") else set())
    assert state.step == 0
    if hasattr(state, "target_params"):
        jax.tree.map(np.testing.assert_array_equal, state.params, state.target_params)
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim > 1]
    drawn = [x for x in kernels if x.any()]
    assert len(drawn) > 2
    scaled = np.concatenate([np.ravel(x) * np.prod(x.shape[:-1]) ** 0.5 for x in drawn])
    assert scaled.std() == pytest.approx(0.774**0.5, rel=0.02)
    assert len(kernels) - len(drawn) == {"bc": 1, "cql": 1, "crr": 2}.get(name.split("_")[0], 3)
    length = {"bc": 1, "cql": 2, "crr": 2}.get(name.split("_")[0])
    assert module.window_length(args) == (length or args.unroll_steps + 1 + args.td_steps)


@pytest.mark.parametrize("name", helpers.ATARI)
def test_accelerators_have_bfloat16_unless_told(name, monkeypatch):
    module = importlib.import_module(name)
    cases = (("cpu", "auto", "float32"), ("gpu", "auto", "bfloat16"))
    for backend, given, dtype in (*cases, ("tpu", "float32", "float32")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert module.make_network(4, module.Args(dtype=given)).dtype == jnp.dtype(dtype)


def layers(params, x):
    """An MLP in plain numbers, with relu between its layers."""
    for i in range(len(params)):
        x = np.maximum(x, 0) if i else x
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
    return x


def output(params, x):
    return np.maximum(x, 0) @ params["kernel"] + params["bias"]


@pytest.mark.parametrize("name", helpers.LOSSES)
def test_networks_of_bsuite_against_numpy(name):
    module = importlib.import_module(f"{name}_bsuite")
    network = module.make_network(3, module.Args())
    params = helpers.make_params(module, network, 0)["params"]
    x = np.random.default_rng(0).normal(size=(5, 10, 5)).astype(np.float32)
    action = jnp.full(5, 1)
    # flax counts from the outside: MLP_1 is the representation.
    h, f = [params[k] for k in (("MLP_1", "MLP_0") if "MLP_0" in params else ("h", "f"))]
    state = layers(h, x.reshape(5, -1))
    after = np.concatenate([state, np.eye(3)[action]], axis=-1)
    if name in ("bc", "cql"):
        found = [network.apply({"params": params}, x).reshape(5, -1)]
        expected = [output(params["Dense_0"], layers(f, state))]
    elif name == "crr":
        policy, q = network.apply({"params": params}, x)
        found = policy, q[:, 1]
        expected = [output(params["policy"], layers(f, state))]
        expected += [output(params["q"], layers(params["g"], after))]
    else:
        found = network.apply({"params": params}, x, action)
        y = layers(f, layers(params["g"], after))
        expected = [output(params[head], y) for head in ("policy", "value", "reward")]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [x for x in NAMES if x.startswith(("rosmo", "muzero"))])
def test_random_actions_past_an_end_are_any_of_the_actions(name, monkeypatch):
    sizes = {"channels": 4, "num_bins": 21, "unroll_steps": 2, "td_steps": 1, "num_simulations": 2}
    module, args = helpers.script_and_args(name, **sizes)
    network, bounds = module.make_network(4, args), []
    atari = name.endswith("_atari")
    observation = jnp.zeros((84, 84, 4), jnp.uint8) if atari else jnp.zeros((10, 5))
    params = jax.eval_shape(network.init, jax.random.key(0), observation, jnp.int32(0))
    make_batch = helpers.random_batch if atari else helpers.random_steps
    randint = lambda key, shape, *x: bounds.append(x) or jnp.zeros(shape, jnp.int32)  # noqa: E731
    monkeypatch.setattr(jax.random, "randint", randint)
    loss = getattr(module, LOSSES[name.rsplit("_", 1)[0]])
    inputs = make_batch(2, module.window_length(args)), jax.random.key(0)
    jax.eval_shape(lambda p: loss(p, p, *inputs, network, args), params)
    assert bounds == [(0, 4)]
