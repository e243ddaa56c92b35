"""Losses and actions of the Atari scripts equal those of the BSuite scripts on the same inputs.

The latter are tested against naive loops. On Atari observations are encoded from frames, and CRR
and CQL clip rewards.
"""

import dataclasses
import importlib
import inspect
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rosmo_atari

pytestmark = pytest.mark.usefixtures("hurry")
# A low discount, so that losses and signs of advantages depend on it.
SETTINGS = {"channels": 4, "num_bins": 21, "dtype": "float32", "unroll_steps": 2, "td_steps": 2}
SETTINGS |= {"eval_epsilon": 0.5, "dirichlet_fraction": 0.5, "eval_dirichlet_fraction": 1.0}
SETTINGS |= {"discount": 0.5}
KEY = jax.random.key(0)
TRUNCATION = {"truncation_as_termination": True}
VARIANTS = {
    "rosmo": [{}, {"num_samples": 2, "behavior_advantage": "next-observation"} | TRUNCATION],
    "muzero_unplugged": [{}, TRUNCATION],
    "bc": [{}],
    "crr": [{}, {"weight": "binary", "num_action_samples": 2, "clip_rewards": False} | TRUNCATION],
    "cql": [{}, {"clip_rewards": False} | TRUNCATION],
}


def quick_search(params, state, prediction, key, noise, network, args):
    """In place of MuZero's, which is the same in both scripts: depends on all that it is given."""
    value = rosmo_atari.to_scalar(prediction.value_logits) + state.mean(axis=(-3, -2, -1))
    logits = prediction.policy_logits
    return jax.nn.softmax(logits + noise * jax.random.normal(key, logits.shape)), value


def uneven(look_ahead, params, state, action, network, discount):
    """With what makes the sign of an advantage depend on the action."""
    return look_ahead(params, state, action, network, discount) + 2 * jnp.cos(2.0 * action)


@pytest.fixture(scope="module", params=helpers.LOSSES)
def pair(request):
    """The scripts of a method with arguments, a network and two sets of parameters."""
    ours, args = helpers.script_and_args(f"{request.param}_atari", **SETTINGS)
    theirs = importlib.import_module(f"{request.param}_bsuite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "ResidualBlock", lambda *_: lambda x: x)  # losses know nothing of them
        network = ours.make_network(4, args)
        params = [helpers.make_params(ours, network, seed, scale=0.1) for seed in range(2)]
        if request.param == "rosmo":  # a state has three axes, not one
            look_ahead = partial(uneven, ours.look_ahead)
            for module in (ours, theirs):
                patch.setattr(module, "look_ahead", look_ahead)
        if request.param == "muzero_unplugged":
            patch.setattr(ours, "search", quick_search)
            patch.setattr(theirs, "search", quick_search)
        yield request.param, ours, theirs, network, args, params


def test_losses(pair):
    name, ours, theirs, network, args, (params, target_params) = pair
    length = ours.window_length(args)
    batch = helpers.random_batch(32, length)
    observation = rosmo_atari.stack_frames(batch.frames, batch.history)
    flags = (batch.is_last, batch.is_terminal)
    assert np.abs(batch.reward).max() > 1  # some are clipped

    def gradient(script, batch, args):
        """And the metrics, of which one is the loss."""
        function = getattr(script, helpers.LOSSES[name])
        inputs = {"target_params": target_params, "batch": batch, "key": KEY}
        known = inspect.signature(function).parameters  # BC's loss has no arguments
        settings = {"network": network, "args": args}
        loss = partial(function, **{k: settings[k] for k in settings if k in known})
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return gradient(params, **{k: inputs[k] for k in inputs if k in known})

    for variant in VARIANTS[name]:
        changed = dataclasses.replace(args, **variant)
        clips = getattr(changed, "clip_rewards", False)
        reward = np.clip(batch.reward, -1, 1) if clips else batch.reward
        steps = theirs.Steps(observation, batch.action, reward, *flags)
        expected, expected_metrics = gradient(theirs, steps, changed)
        found, metrics = gradient(ours, batch, changed)
        for key, value in metrics.items():
            value = pytest.approx(float(value), rel=1e-3, abs=1e-5)
            assert float(expected_metrics[key]) == value, (variant, key)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("name", helpers.LOSSES)
def test_actions(name):
    """Are chosen by the same lines as on BSuite."""
    scripts = [importlib.import_module(f"{name}_{domain}") for domain in ("atari", "bsuite")]
    ours, theirs = (inspect.getsource(script.act.__wrapped__) for script in scripts)
    assert ours == theirs


def test_weights_of_crr_are_those_of_bsuite_also_beyond_the_cap():
    scripts = [importlib.import_module(f"crr_{domain}") for domain in ("atari", "bsuite")]
    advantage = jnp.linspace(-5, 50, 12)
    for weight in ("exp", "binary"):
        found = [x.regression_weight(advantage, x.Args(weight=weight, beta=0.5)) for x in scripts]
        np.testing.assert_array_equal(*found)
