"""Losses and actions of the Atari scripts equal those of the BSuite scripts on the same inputs.

The latter are tested against naive loops. On Atari observations are encoded from frames, and CRR
and CQL clip rewards.
"""

import dataclasses
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari
from test_rosmo_atari import random_batch

pytestmark = pytest.mark.usefixtures("hurry")
LOSSES = {"rosmo": "rosmo_loss", "muzero_unplugged": "muzero_loss"}
LOSSES |= {name: f"{name}_loss" for name in ("bc", "crr", "cql")}
SETTINGS = {"channels": 4, "num_bins": 21, "dtype": "float32", "unroll_steps": 2, "td_steps": 2}
SETTINGS |= {"eval_epsilon": 0.5, "dirichlet_fraction": 0.5, "eval_dirichlet_fraction": 1.0}
KEY = jax.random.key(0)


def quick_search(network, params, state, prediction, key, noise, args):
    """In place of MuZero's, which is the same in both scripts: depends on all that it is given."""
    value = rosmo_atari.to_scalar(prediction.value_logits) + state.mean(axis=(-3, -2, -1))
    logits = prediction.policy_logits
    return jax.nn.softmax(logits + noise * jax.random.normal(key, logits.shape)), value


@pytest.fixture(scope="module", params=LOSSES)
def pair(request):
    """The scripts of a method with arguments, a network and two sets of parameters."""
    ours, theirs = (importlib.import_module(f"{request.param}_{d}") for d in ("atari", "bsuite"))
    fields = {field.name for field in dataclasses.fields(ours.Args)}
    args = ours.Args(**{k: v for k, v in SETTINGS.items() if k in fields})
    network, rng = ours.make_network(4, args), np.random.default_rng(0)
    inputs = [jnp.zeros((84, 84, 4), jnp.uint8)]
    inputs += [jnp.int32(0)] if "unroll_steps" in fields else []
    zero_heads = jax.jit(network.init)(KEY, *inputs)
    noise = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    params = [jax.tree.map(noise, zero_heads) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "rosmo":  # a state has three axes, not one
            patch.setattr(theirs, "look_ahead", ours.look_ahead)
        if request.param == "muzero_unplugged":
            patch.setattr(ours, "search", quick_search)
            patch.setattr(theirs, "search", quick_search)
        yield request.param, ours, theirs, network, args, params


def test_losses(pair):
    name, ours, theirs, network, args, (params, target_params) = pair
    lengths = {"bc": 1, "crr": 2, "cql": 2}
    length = lengths.get(name, 5)  # K + 1 + n
    batch = random_batch(batch_size=8)
    batch = jax.tree.map(lambda x: x[:, : length + 3 * (x.ndim == 4)], batch)
    observation = [rosmo_atari.stack_frames(batch.frames, batch.history, t) for t in range(length)]
    reward = np.clip(batch.reward, -1, 1) if name in ("crr", "cql") else batch.reward
    flags = batch.is_last, batch.is_terminal
    steps = theirs.Steps(jnp.stack(observation, axis=1), batch.action, reward, *flags)

    def metrics(script, batch):
        function = getattr(script, LOSSES[name])
        inputs = {"params": params, "target_params": target_params, "batch": batch, "key": KEY}
        inputs |= {"network": network, "args": args}
        parameters = inspect.signature(function).parameters
        return jax.jit(lambda: function(**{k: inputs[k] for k in parameters})[1])()

    expected = metrics(theirs, steps)
    for key, value in metrics(ours, batch).items():
        assert value == pytest.approx(float(expected[key]), rel=1e-4, abs=1e-6), key


def test_actions(pair):
    _, ours, theirs, network, args, (params, _) = pair
    shape = (48, 84, 84, 4)
    observation = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    actions = []
    for greedy in (True, False):
        expected = jax.jit(lambda greedy=greedy: theirs.act(
            greedy, network, args, params, observation, KEY
        ))()  # fmt: skip
        actions.append(ours.act(params, observation, KEY, greedy, network, args).tolist())
        assert actions[-1] == expected.tolist()
    assert actions[0] != actions[1]
