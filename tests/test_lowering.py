"""The programs of every script are lowered for GPUs and TPUs, where there is neither.

Nothing is compiled and nothing runs: parameters are shapes. In the lowered text a convolution or a
matrix product stands with its types, its precision and a location that names its layer.
"""

import re
from collections import Counter
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import pytest

SETTINGS = {"channels": 4, "num_bins": 21, "batch_size": 4, "unroll_steps": 1, "td_steps": 1}
SETTINGS |= {"num_simulations": 2, "members": 2, "deter": 16, "hidden": 12, "latents": 3}
SETTINGS |= {"classes": 4, "depth": 1, "head_units": 8, "rollout_length": 2, "minibatches": 1}
SETTINGS |= {"epochs": 1, "rollout_starts": 4, "rollout_generations": 2}
SAMPLED = {"num_samples": 2}
CALLBACK = r"custom_call @\w*callback|stablehlo\.(send|recv|infeed|outfeed)\b"
CASES = [(name, {}) for name in helpers.SCRIPTS]
CASES += [("rosmo_atari", SAMPLED), ("rosmo_bsuite", SAMPLED)]

# Layers in float32, by design.
MUZERO = {"policy", "value", "reward"}
FLOAT32 = {"rosmo_bsuite": MUZERO, "muzero_unplugged_bsuite": MUZERO}
FLOAT32 |= {"bc_bsuite": {"Dense_0"}, "cql_bsuite": {"Dense_0"}, "crr_bsuite": {"policy", "q"}}
FLOAT32["rosmo_atari"] = FLOAT32["muzero_unplugged_atari"] = {f"{x}/Dense_2" for x in MUZERO}
FLOAT32 |= {"bc_atari": {"Head_0/Dense_2"}, "cql_atari": {"Head_0/Dense_2"}}
FLOAT32 |= {"crr_atari": {"policy/Dense_2", "q/Head_0/Dense_2"}}
MEMBER = {"prior_logits", "posterior_logits", "reward_head/Dense_0", "terminal_head/Dense_0"}
FLOAT32 |= {"combo_atari": MEMBER | {"Head_0/Dense_2"}}
FLOAT32 |= {"morel_atari": MEMBER | {"Head_0/Dense_2", "Head_1/Dense_2"}}

# Scripts whose networks are those of others to the byte.
SAME_NETWORKS = ("muzero_unplugged_atari", "muzero_unplugged_bsuite", "combo_atari")

# Layers that a program leaves out.
UNUSED = {"crr_atari act": "q/", "crr_bsuite act": "q|g/", "morel_atari act": "Head_1/"}
UNUSED |= {"morel_atari clone": "Head_1/"}
UNUSED |= {f"rosmo_{domain} act num_samples": "g/|value|reward" for domain in ("atari", "bsuite")}


@pytest.fixture(autouse=True, scope="module")
def small_representation():
    """But for bc_atari.py, which has the same."""
    with pytest.MonkeyPatch.context() as patch:
        helpers.with_small_representation(patch, *(x for x in helpers.ATARI if x != "bc_atari"))
        yield


def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def keys(*shape: int):
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape))


def windows(module, *shape: int):
    """Of a world model."""
    types = (jnp.int32, jnp.float32, bool, bool)
    return module.Windows(array(jnp.uint8, *shape, 84, 84), *(array(t, *shape) for t in types))


def bsuite_programs(module, args):
    """Yields programs: a name, a trace, and the parameters of which it makes use."""
    options = {"network": module.make_network(3, args), "args": args}
    steps = jax.tree.map(lambda x: x[0], helpers.random_steps(1, 60))
    init = partial(module.init_state, observation=steps.observation[0], **options)
    states = jax.eval_shape(jax.vmap(init), keys(2))
    act = jax.jit(jax.vmap(partial(module.act, greedy=False, **options)))
    observation = array(jnp.float32, 2, 3, 10, 5)
    yield "act", act.trace(states.params, observation, keys(2)), states.params
    mesh = jax.make_mesh((1,), ("data",), axis_types=(module.AxisType.Auto,))
    options["by_device"] = module.NamedSharding(mesh, module.P("data"))
    data = keys(2), steps, array(jnp.int32, 2, 60), array(jnp.int32, 2)
    _, sums = jax.eval_shape(partial(module.update_seeds, **options), states, *data)
    yield "train", module.train.trace(5, states, sums, data, **options), states.params


def atari_programs(module, args):
    options, key = {"network": module.make_network(5, args), "args": args}, keys()
    if module.__name__ == "morel_atari":
        params = yield from morel_programs(module, options["network"], args)
    else:
        state = jax.eval_shape(partial(module.init_state, **options), key)
        length = 2 if module.__name__ == "combo_atari" else module.window_length(args)
        batch, params = helpers.random_batch(4, length), state.params
        yield "update", module.update.trace(state, key, batch, **options), params
    observation = array(jnp.uint8, 3, 84, 84, 4)
    yield "act", module.act.trace(params, observation, key, False, **options), params
    if module.__name__ == "combo_atari":
        member = yield from world_model_programs(module, args)
        batch = helpers.random_batch(4, args.rollout_warm_up + 1)
        starts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)
        inputs = (state.rollouts, starts, 0, False, params, stacked(member), key)
        options["model"] = module.make_world_model(5, args)
        yield "add_rollouts", module.add_rollouts.trace(*inputs, **options), both(params, member)


def world_model_programs(module, args):
    """Returns the parameters of a member."""
    network, key = module.make_world_model(5, args), keys()
    options, empty = {"network": network, "args": args}, module.empty_state(network)
    frame = array(jnp.uint8, 84, 84)
    member = jax.eval_shape(network.init, key, empty, array(jnp.int32), frame)
    if module.__name__ == "morel_atari":  # in both scripts the same, as is the rest of the model
        opt_state = jax.eval_shape(module.model_optimizer(args).init, member)
        state = module.MemberState(member, opt_state, array(jnp.int32))
        inputs = (state, windows(module, 2, 3), key)
        yield "update_member", module.update_member.trace(*inputs, **options), member
        inputs = (member, windows(module, 2, 20), key)
        yield "evaluate_member", module.evaluate_member.trace(*inputs, **options), member
    return member


def morel_programs(module, policy, args):
    """Returns the parameters of the policy."""
    member = yield from world_model_programs(module, args)
    members, key, options = stacked(member), keys(), {"policy": policy, "args": args}
    model = {"model": module.make_world_model(5, args)}
    inputs = (members, windows(module, 4, 5), array(jnp.int32, 4, 3))
    yield "replay", module.replay.trace(*inputs, args=args, **model), member
    state = jax.eval_shape(partial(module.init_state, **model, **options), key)
    inputs = (state, windows(module, 4 * args.starts, 5), members, key)
    traced, params = module.collect.trace(*inputs, **model, **options), state.params
    yield "collect", traced, both(params, member)
    as_arrays = partial(jax.tree.map, lambda x: array(x.dtype, *x.shape))
    _, steps, advantage, order, _ = as_arrays(traced.out_info)
    index = array(order.dtype, *order.shape[1:])
    yield "learn", module.learn.trace(state, steps, advantage, index, **options), params
    opt_state = jax.eval_shape(module.optax.adam(1e-3).init, params)
    inputs = (params, opt_state, helpers.random_batch(4, 1))
    yield "clone", module.clone.trace(*inputs, **options), params
    return params


def stacked(member):
    return jax.tree.map(lambda x: array(x.dtype, 2, *x.shape), member)


def both(params, member):
    return {"params": params["params"] | member["params"]}


def layers(params) -> set[str]:
    """The paths of those that have a kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(params["params"])
    names = [[key.key for key in path] for path, _ in leaves]
    return {"/".join(path) for *path, leaf in names if leaf == "kernel"}


def operations(text: str, names: set[str]) -> Counter:
    """Numbers of convolutions and matrix products of each layer, types and precision."""
    locations = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    found = Counter()
    for line in text.splitlines():
        if re.search(r"stablehlo\.(convolution|dot_general)\b", line):
            location = locations[re.search(r"loc\((#loc\d+)\)$", line)[1]]
            scope = re.sub(r"\w+\(|\)", "", location).rsplit("/", 1)[0]  # without jvp(...)
            owners = [name for name in names if scope.endswith(f"/{name}")]
            layer = max(owners, key=len, default=scope.rsplit("/", 1)[-1])
            types = "|".join(sorted(set(re.findall(r"[<x]([a-z]+\d+)>", line))))
            found[layer, types, "highest" if line.count("HIGHEST") == 2 else "default"] += 1
    return found


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_accelerators_compute_every_layer_in_its_type(name, settings):
    programs, counts = atari_programs if name.endswith("_atari") else bsuite_programs, {}
    cases = [("bfloat16", "bf16"), ("float32", "f32")]
    for dtype, short in cases[:1] if settings or name in SAME_NETWORKS else cases:
        module, args = helpers.script_and_args(name, dtype=dtype, **SETTINGS, **settings)
        for program, traced, params in programs(module, args):
            label = " ".join([name, program, *settings])
            unused = re.compile(UNUSED.get(label, "$"))
            used = {layer for layer in layers(params) if not unused.match(layer)}
            expected = {(layer, short, "default") for layer in used - FLOAT32[name]}
            for layer in used & FLOAT32[name]:  # accelerators have fewer bits by default
                expected.add((layer, "f32", "default" if layer in MEMBER else "highest"))
            text = traced.lower(lowering_platforms=("cuda", "tpu")).as_text(debug_info=True)
            found = operations(text, layers(params))
            assert set(found) == expected, f"{label} in {dtype}"
            assert set(re.findall(r"[<x](b?f\d+)>", text)) == {"f32", short}, label
            assert not re.findall(CALLBACK, text), label
            if program == "train":  # devices share every part of a batch of 2 seeds and 4 rows
                shared = re.findall(r"sharding_constraint %\S+ <@mesh, .*tensor<2x4x", text)
                assert len(shared) == 5
            # Devices do not share grouped convolutions, which a vmap over networks makes.
            assert set(re.findall(r"feature_group_count = (\d+)", text)) <= {"1"}, label
            total = Counter()
            for (layer, *_), number in found.items():
                total[layer] += number
            assert counts.setdefault(label, total) == total
