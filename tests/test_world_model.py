"""The world model of morel_atari.py: its maths, its data, learning on real frames, its runs."""

import dataclasses
import json
import shutil
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from conftest import Killed
from flax import serialization
from helpers import metrics
from scipy.special import softmax

import combo_atari
import morel_atari as morel

pytestmark = pytest.mark.usefixtures("hurry")
SIZES = "--members 2 --deter 16 --hidden 16 --latents 4 --classes 4 --depth 2 --head-units 16"
TINY = f"--env-id Pong {SIZES} --model-length 6 --model-batch-size 2 --log-every 2"
TINY += " --model-eval-every 4 --model-updates 12 --model-eval-batches 1 --heldout-percent 30"
ARGS = tyro.cli(morel.Args, args=TINY.split())
NETWORK = morel.make_world_model(6, ARGS)
OBSERVE = jax.jit(partial(morel.observe, NETWORK))
IMAGINE = jax.jit(partial(morel.imagine, NETWORK))
DECODE = jax.jit(partial(NETWORK.apply, method="decode"))
HANDLERS = {}  # of the signals


@pytest.fixture(scope="module")
def first_members():
    """Those of a run."""
    key = jax.random.split(jax.random.key(ARGS.seed), 5)[2]
    first, second = morel.init_members(key, NETWORK, 2)
    kernels = [x["params"]["encoder"]["Conv_0"]["kernel"] for x in (first, second)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    return [first, second]


@pytest.fixture(scope="module")
def params(first_members):
    """Of the first member."""
    return first_members[0]


@pytest.fixture(scope="module")
def store(toy_path):
    return morel.open_store(dataclasses.replace(ARGS, dataset=toy_path))


def random_windows(batch_size: int = 3, length: int = 5, seed: int = 0) -> morel.Windows:
    rng = np.random.default_rng(seed)
    shape = (batch_size, length)
    return morel.Windows(
        rng.integers(0, 256, (*shape, 84, 84), dtype=np.uint8),
        rng.integers(0, 6, shape).astype(np.int32),
        rng.normal(size=shape).astype(np.float32),
        np.zeros(shape, bool),
        rng.random(shape) < 0.3,
    )


def naive_kl(p_logits, q_logits):
    p, q = softmax(p_logits, axis=-1), softmax(q_logits, axis=-1)
    return np.sum(p * np.log(p / q))


def test_the_prior_gets_eight_tenths_of_the_gradient_of_the_kl():
    rng = np.random.default_rng(0)
    posterior, prior = rng.normal(size=(2, 3, 4))
    kl = partial(morel.balanced_kl, balance=0.8)
    assert kl(posterior, prior) == pytest.approx(naive_kl(posterior, prior), rel=1e-4)
    gradients = jax.grad(kl, argnums=(0, 1))(jnp.array(posterior), jnp.array(prior))
    for i, share in enumerate((0.2, 0.8)):
        for index in np.ndindex(3, 4):
            ends = []
            for step in (1e-5, -1e-5):
                logits = [posterior.copy(), prior.copy()]
                logits[i][index] += step
                ends.append(naive_kl(*logits))
            expected = share * (ends[0] - ends[1]) / 2e-5
            assert gradients[i][index] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("with_key", [False, True])
def test_a_latent_is_one_hot_and_its_gradient_that_of_the_probabilities(with_key):
    rng = np.random.default_rng(0)
    logits, weight = jnp.array(rng.normal(size=(5, 4, 6))), rng.normal(size=(5, 4, 6))
    key = jax.random.key(0) if with_key else None
    latent = morel.draw_latent(logits, key)
    assert set(np.unique(latent)) == {0, 1}
    assert (latent.sum(axis=-1) == 1).all()
    assert (np.argmax(latent, -1) == np.argmax(logits, -1)).all() != with_key
    gradient = jax.grad(lambda x: jnp.sum(morel.draw_latent(x, key) * weight))(logits)
    expected = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * weight))(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.abs(gradient).max() > 0.01


def test_upsampling_is_a_transposed_convolution():
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    ours, theirs = morel.Upsample(5, None), nn.ConvTranspose(5, (6, 6), (2, 2), padding="VALID")
    params = ours.init(jax.random.key(0), x)["params"]["Conv_0"]
    kernel = np.asarray(params["kernel"]).reshape(3, 3, 3, 2, 2, 5)  # i, j, C, row, column, C'
    transposed = np.zeros((6, 6, 3, 5), np.float32)
    for i, j, row, column in np.ndindex(3, 3, 2, 2):
        transposed[1 + 2 * i - row, 1 + 2 * j - column] = kernel[i, j, :, row, column]
    expected = theirs.apply({"params": {"kernel": transposed, "bias": np.zeros(5)}}, x)
    assert expected.shape == (2, 18, 18, 5)
    np.testing.assert_allclose(ours.apply({"params": {"Conv_0": params}}, x), expected, atol=1e-5)


def test_frames_survive_the_way_to_images_and_back():
    frames = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(morel.to_frame(morel.to_image(frames)), frames)
    assert morel.to_frame(jnp.array([-2.0, 2.0])).tolist() == [0, 255]


def test_windows_hold_the_action_and_the_reward_before_each_frame(store):
    firsts = terminals = 0
    for step in range(20):
        batch = morel.sample_batch(store, 0, step, 4, 7)
        windows = morel.model_windows(batch, clip_rewards=False)
        assert windows.frame.shape == (4, 6, 84, 84)
        for b, t in np.ndindex(4, 6):
            frame, action = windows.frame[b, t], windows.action[b, t]
            assert (frame == frame[0, 0]).all()
            if windows.is_first[b, t]:
                assert (frame[0, 0], action, windows.reward[b, t]) == (0, -1, 0)
            else:
                assert frame[0, 0] == 40 * (action + 1)
                assert windows.reward[b, t] == action / 4
            firsts += windows.is_first[b, t]
            terminals += windows.terminal[b, t]
            if windows.terminal[b, t] and t + 1 < 6:
                assert windows.is_first[b, t + 1]
        np.testing.assert_array_equal(windows.frame[:, :-1], batch.frames[:, 4:-1])
        clipped = morel.model_windows(batch, clip_rewards=True)
        np.testing.assert_array_equal(clipped.reward, np.minimum(windows.reward, 1))
    assert firsts > terminals > 0


def test_held_out_episodes_are_not_learned_from(store):
    learn, heldout = morel.split_store(store, 30, seed=0)
    sets = [{*x.episodes["id"].tolist()} for x in (learn, heldout)]
    assert [len(ids) for ids in sets] == [6, 2]
    assert sets[0] | sets[1] == set(range(8))
    assert {*morel.split_store(store, 30, seed=1)[1].episodes["id"].tolist()} != sets[1]
    for part in (learn, heldout):
        rows = [np.arange(e["start"], e["start"] + e["length"]) for e in part.episodes]
        np.testing.assert_array_equal(part.index, np.concatenate(rows))
        assert [len(x) for x in rows] == [25 + i for i in part.episodes["id"]]
    with pytest.raises(SystemExit, match="cannot be held out"):
        morel.split_store(store, 99, seed=0)


def test_shapes_and_types_at_the_default_sizes():
    network = morel.make_world_model(9, morel.Args(dtype="bfloat16"))
    frame = jnp.zeros((84, 84), jnp.uint8)
    params = jax.eval_shape(
        network.init, jax.random.key(0), morel.empty_state(network), jnp.int32(0), frame
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    windows = random_windows(2, 3)
    outputs = jax.eval_shape(
        lambda p: morel.observe(network, p, windows, jax.random.key(0)), params
    )
    state, prior, posterior = outputs
    assert state.deter.shape == (2, 3, 1024)
    assert prior.shape == posterior.shape == state.latent.shape == (2, 3, 32, 32)
    decoded = jax.eval_shape(lambda p, s: network.apply(p, s, method="decode"), params, state)
    assert [x.shape for x in decoded] == [(2, 3, 84, 84), (2, 3), (2, 3)]
    assert {x.dtype for x in (*decoded, prior, posterior)} == {jnp.dtype("float32")}
    assert params["params"]["encoder"]["Conv_3"]["kernel"].shape == (4, 4, 192, 384)
    assert params["params"]["embedding_input"]["kernel"].shape == (3 * 3 * 384, 1000)
    assert params["params"]["decoder"]["Dense_0"]["kernel"].shape == (2048, 1536)


def test_the_prior_goes_on_from_a_filtered_state_as_the_filter_does(params):
    windows = random_windows()
    states, prior, _ = OBSERVE(params, windows)
    before = jax.tree.map(lambda x: x[:, :-1], states)
    after = IMAGINE(params, before, windows.action[:, 1:])
    np.testing.assert_allclose(after.deter, states.deter[:, 1:], atol=1e-5)
    np.testing.assert_array_equal(np.argmax(after.latent, -1), np.argmax(prior[:, 1:], -1))
    other = IMAGINE(params, before, (windows.action[:, 1:] + 1) % 6)
    assert np.abs(other.deter - after.deter).max() > 1e-3


def test_filtering_starts_afresh_at_a_first_frame(params):
    windows = random_windows()
    tail = jax.tree.map(lambda x: x[:, 2:], windows)
    whole, *_ = OBSERVE(params, windows)
    is_first, action = windows.is_first.copy(), windows.action.copy()
    is_first[1, 2], action[1, 2] = True, -1  # a new episode in the second window only
    reset, *_ = OBSERVE(params, windows._replace(is_first=is_first, action=action))
    alone = tail._replace(action=action[:, 2:])
    afresh, *_ = OBSERVE(params, alone)
    np.testing.assert_allclose(reset.deter[1, 2:], afresh.deter[1], atol=1e-5)
    np.testing.assert_allclose(reset.deter[::2], whole.deter[::2], atol=1e-5)
    assert np.abs(reset.deter[1, 2:] - whole.deter[1, 2:]).max() > 1e-3


def test_every_filtered_step_draws_a_latent_of_its_own(params):
    nothing = jax.tree.map(jnp.zeros_like, params)  # so that all latents are as probable
    states, *_ = OBSERVE(nothing, random_windows(2, 6), jax.random.key(0))
    drawn = np.argmax(states.latent, axis=-1)
    assert (drawn[:, 1:] != drawn[:, :-1]).mean() > 0.5


def test_the_layers_of_a_member_are_put_together_as_told(params):
    """Against plain numbers, but for convolutions, GRU and `Upsample`, which has a test above."""
    p, rng = helpers.with_noise(params, 0)["params"], np.random.default_rng(0)

    def elu(x):
        return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def normalised(x, p):
        return elu(helpers.layer_norm(x, -1, **p, epsilon=1e-6)).astype(np.float32)

    def layer(x, p):
        return normalised(dense(x, p["Dense_0"]), p["LayerNorm_0"])

    def convolution(x, p):
        return nn.Conv(len(p["bias"]), (4, 4), 2, padding="VALID").apply({"params": p}, x)

    deter, embedding = rng.normal(size=(2, 5, 16)).astype(np.float32)
    latent, action = jnp.eye(4)[rng.integers(0, 4, (5, 4))], np.arange(5)
    frame = rng.integers(0, 256, (5, 84, 84), dtype=np.uint8)
    flat = latent.reshape(5, -1)
    x = normalised(
        dense(flat, p["latent_input"]) + p["action_input"]["kernel"][action], p["input_norm"]
    )
    after = nn.GRUCell(16).apply({"params": p["gru"]}, deter, x)[0]
    prior = dense(layer(deter, p["prior_layer"]), p["prior_logits"])
    z = normalised(dense(deter, p["deter_input"]) + embedding, p["posterior_norm"])
    image = morel.to_image(frame)[..., None]
    for i in range(4):
        image = elu(convolution(image, p["encoder"][f"Conv_{i}"])).astype(np.float32)
    features = y = np.concatenate([deter, flat], axis=-1)
    for i in range(4):
        y = layer(y, p["reward_head"][f"Layer_{i}"])
    y = dense(y, p["reward_head"]["Dense_0"])[:, 0]
    d = p["decoder"]
    x = elu(dense(dense(features, d["Dense_0"]), d["Dense_1"])).reshape(5, 7, 7, 8)
    for i, channels in enumerate((4, 2, 1)):
        x = morel.Upsample(channels, None).apply({"params": d[f"Upsample_{i}"]}, x)
        x = elu(x).astype(np.float32) if i < 2 else x
    state = morel.State(deter, latent)
    decoded = NETWORK.apply({"params": p}, state, method="decode")
    for method, inputs, expected in (
        ("advance", (state, action), after),
        ("prior", (deter,), prior.reshape(5, 4, 4)),
        ("posterior", (deter, embedding), dense(z, p["posterior_logits"]).reshape(5, 4, 4)),
        ("encode", (frame,), dense(image.reshape(5, -1), p["embedding_input"])),
    ):
        found = NETWORK.apply({"params": p}, *inputs, method=method)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(decoded.reward, y, rtol=1e-3, atol=1e-4)
    background = d["background"].reshape(84, 84)
    np.testing.assert_allclose(decoded.image, x[..., 0] + background, rtol=1e-3, atol=1e-4)


def test_the_loss_against_plain_numbers_and_its_gradient_reaches_every_parameter(params):
    windows, key = random_windows(), jax.random.key(1)
    loss = partial(morel.world_model_loss, windows=windows, key=key, network=NETWORK, args=ARGS)
    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(params)
    states, prior, posterior = OBSERVE(params, windows, key)
    image, reward, logit = map(np.array, DECODE(params, states))
    real = windows.frame / 255 - 0.5
    p = 1 / (1 + np.exp(-logit))
    expected = {
        "image": 0.5 * ((image - real) ** 2).sum() / 15,
        "reward": 0.5 * ((reward - windows.reward) ** 2).mean(),
        "terminal": -np.log(np.where(windows.terminal, p, 1 - p)).mean(),
        "kl": 0.1 * naive_kl(np.array(posterior), np.array(prior)) / 15,
    }
    expected["total"] = sum(expected.values())
    assert losses == pytest.approx(expected, rel=1e-3)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def member_state(params, step: int = 0) -> morel.MemberState:
    opt_state = morel.model_optimizer(ARGS).init(params)
    state = morel.MemberState(params, opt_state, jnp.int32(step))
    return jax.tree.map(jnp.array, state)  # copies, as an update takes them


def test_the_latents_of_an_update_belong_to_its_step_and_its_key(params):
    def loss(step, seed):
        inputs = (random_windows(), jax.random.key(seed), NETWORK, ARGS)
        _, metrics = morel.update_member(member_state(params, step), *inputs)
        return float(metrics["losses/total"])

    first = loss(0, 0)
    assert loss(0, 0) == first
    assert first not in (loss(1, 0), loss(0, 1))


def test_two_members_wait_for_a_device_at_most(monkeypatch):
    """The devices of a CPU hang if 32 programs do."""
    waiting, numbers = [], []

    def update_member(number, *_):
        waiting.append((number, {}))
        numbers.append(len(waiting))
        return waiting[-1]

    monkeypatch.setattr(morel, "update_member", update_member)
    monkeypatch.setattr(jax, "block_until_ready", lambda done: list(map(waiting.remove, done)))
    state = morel.ModelState(list(range(20)), *5 * [None])
    assert morel.update_model(state, range(20), range(20), NETWORK, ARGS) == (state, {})
    assert max(numbers) == 2


def test_members_are_given_windows_of_their_own(store):
    batch = morel.sample_batch(store, ARGS.seed, 3, 4, 7)
    whole = morel.model_windows(batch, ARGS.clip_rewards)
    first, second = morel.sample_windows(store, 3, 6, 2, ARGS)
    jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(lambda x: x[0::2], whole))
    jax.tree.map(np.testing.assert_array_equal, second, jax.tree.map(lambda x: x[1::2], whole))


def test_members_learn_from_their_own_windows_and_the_metrics_are_their_means(params):
    keys, windows = jax.random.split(jax.random.key(0)), [random_windows(seed=i) for i in range(2)]
    state = morel.init_model(jax.random.key(1), jnp.zeros((84, 84)), NETWORK, ARGS)
    state = state._replace(members=[member_state(params), member_state(params)])
    state, metrics = morel.update_model(state, windows, keys, NETWORK, ARGS)
    alone = []
    for i in range(2):
        member, part = morel.update_member(member_state(params), windows[i], keys[i], NETWORK, ARGS)
        jax.tree.map(np.testing.assert_array_equal, state.members[i], member)
        alone.append(part)
    for name, value in metrics.items():
        assert alone[0][name] != alone[1][name]
        assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2)
    assert morel.mean_metrics({"x": np.float32(6)}, 3) == {"x": 2}


def test_the_best_parameters_are_kept_and_the_reference_tells_when_training_ends():
    """A loss that is lower by less than 0.5% is a better one, but no improvement."""
    init = {"members": [morel.MemberState(jnp.zeros(1), None, jnp.int32(0))], "best": []}
    never = {"best_loss": jnp.float32(np.inf), "best_update": jnp.int32(0)}
    state = morel.ModelState(**init, **never, reference=jnp.float32(np.inf), improved=jnp.int32(0))
    improved, best = [], []
    for update, loss in enumerate((100, 99.6, 99.4, 99.8, 98.8, 98.0), start=1):
        members = [morel.MemberState(jnp.full(1, update), None, jnp.int32(update))]
        state = morel.note_evaluation(state._replace(members=members), loss, update, ARGS)
        improved.append(int(state.improved))
        best.append(int(state.best_update))
        assert state.best[0].tolist() == [best[-1]]
    assert improved == [1, 1, 3, 3, 5, 6]
    assert best == [1, 2, 3, 3, 5, 6]
    assert float(state.best_loss) == 98


def test_a_small_model_overfits_real_segments_and_beats_copying_the_last_frame():
    """One-step predictions of the prior; two segments of random play in the game."""
    env, rng, length = morel.make_env("Riverraid", 2), np.random.default_rng(0), 4
    num_actions = int(env.single_action_space.n)
    observation, _ = env.reset(seed=np.arange(2, dtype=np.int32))
    frames, actions = [observation[:, -1]], [np.full(2, -1)]
    for _ in range(60):
        actions.append(rng.integers(num_actions, size=2))
        observation, *_ = env.step(actions[-1].astype(np.int32))
        frames.append(observation[:, -1])
    frames = np.stack(frames[-length:], axis=1)  # [2, T, 84, 84]
    actions = np.stack(actions[-length:], axis=1).astype(np.int32)
    zeros = np.zeros(actions.shape, bool)
    windows = morel.Windows(frames, actions, zeros.astype(np.float32), zeros, zeros)
    args = morel.Args(
        **dict(members=1, deter=32, hidden=32, latents=8, classes=8, depth=4, head_units=16),
        model_learning_rate=8e-3,
    )
    network = morel.make_world_model(num_actions, args)
    (params,) = morel.init_members(jax.random.key(0), network, 1)
    opt_state = morel.model_optimizer(args).init(params)
    state = morel.MemberState(params, opt_state, jnp.int32(0))
    for _ in range(60):
        state, _ = morel.update_member(state, windows, jax.random.key(1), network, args)

    @jax.jit
    def predict(params):
        states, *_ = morel.observe(network, params, windows)
        before = jax.tree.map(lambda x: x[:, :-1], states)
        after = morel.imagine(network, params, before, actions[:, 1:])
        return network.apply(params, after, method="decode").image

    image = np.array(morel.to_image(frames))
    error = np.mean((predict(state.params) - image[:, 1:]) ** 2)
    copy_error = np.mean((image[:, :-1] - image[:, 1:]) ** 2)
    assert error < 0.8 * copy_error


@pytest.fixture(scope="module")
def train(toy_path, store, first_members):
    """Trains or loads the world model of the run in a folder, in this process.

    Every run begins with the same members, whose program would be compiled anew for each.
    """
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_device, replicated = (morel.NamedSharding(mesh, morel.P(*x)) for x in (["data"], []))
    put = partial(jax.make_array_from_process_local_data, by_device)

    def start(run_dir, overwrite=False, between=lambda run: None, draws=False, **changes):
        args = dataclasses.replace(ARGS, dataset=toy_path, run_dir=run_dir, overwrite=overwrite)
        args = dataclasses.replace(args, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", HANDLERS.__setitem__)
            patch.setattr(morel, "init_members", lambda *_: jax.tree.map(jnp.copy, first_members))
            if not draws:  # it takes longer than the training
                patch.setattr(morel, "draw_predictions", lambda *_: None)
            run = morel.Run(args, [args.seed], store.facts)
            between(run)
            args = dataclasses.replace(args, run_dir=None)
            inputs = (run, store, NETWORK, put, replicated, args)
            members, start.crc32 = morel.get_world_model(*inputs)
            return members

    return start


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The folder of a world model, and its members as training has returned them."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    members = train(run_dir, draws=True)
    return run_dir.with_name("run-world-model"), members


def test_a_world_model_leaves_its_folder(trained, train):
    model, members = trained
    assert (model / "world_model.png").read_bytes()[:4] == b"\x89PNG"
    written = metrics(model)
    assert [x["update"] for x in written if "losses/total" in x] == [2, 4, 6, 8, 10, 12]
    evaluations = [x for x in written if "heldout/total" in x]
    assert [x["update"] for x in evaluations] == [4, 8, 12]
    best = min(evaluations, key=lambda x: x["heldout/total"])
    assert written[-1]["final/best_update"] == best["update"]
    assert written[-1]["final/heldout_total"] == best["heldout/total"]
    assert written[-1]["final/updates"] == 12
    before = (model / "metrics.jsonl").read_bytes()
    loaded = train(model.with_name("run"))  # is finished
    assert (model / "metrics.jsonl").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, loaded, members)
    written = (model / "members.msgpack").read_bytes()
    assert train.crc32 == int.from_bytes(written[:4], "little") == zlib.crc32(written[4:])


def test_kill_and_resume_give_the_numbers_of_a_whole_run(trained, train, tmp_path, monkeypatch):
    """It leaves what a kill would; test_runs_atari.py kills a process."""
    (whole, members), log = trained, morel.Run.log
    model = tmp_path / "killed-world-model"

    def log_and_leave(run, done, seed, values):
        log(run, done, seed, values)
        if done == 6:
            with (run.dir / "metrics.jsonl").open("a") as file:
                file.write('{"update": 8')  # a line that is cut short
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(morel.Run, "log", log_and_leave)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    assert [path.stem for path in (model / "checkpoints").iterdir()] == ["4"]
    assert not (model / "members.msgpack").exists()
    resumed = train(tmp_path / "killed")
    assert len(json.loads((model / "config.json").read_text())["starts"]) == 2
    assert metrics(model) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, members)


def test_a_kill_before_the_members_are_saved_leaves_no_line_twice(trained, train, tmp_path):
    whole, members = trained
    for name in ("run", "run-world-model"):
        folder = whole.with_name(name)
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for file in [x for x in folder.rglob("*") if x.is_file() and x.name != "members.msgpack"]:
            (tmp_path / name / file.relative_to(folder)).write_bytes(file.read_bytes())
    again = train(tmp_path / "run")
    assert metrics(tmp_path / "run-world-model") == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, again, members)


def test_a_signal_stops_training_at_any_update_and_it_goes_on_exactly(
    trained, train, tmp_path, monkeypatch, capsys
):
    whole, members = trained
    updates = [0]

    def interrupting(original, every):
        def call(*inputs):
            updates[0] += 1
            if updates[0] % every == 0:
                # The model's, which stops the policy's run as well.
                HANDLERS[signal.SIGTERM](signal.SIGTERM, None)
            return original(*inputs)

        return call

    monkeypatch.setattr(morel, "update_model", interrupting(morel.update_model, 3))
    monkeypatch.setattr(morel, "evaluate_member", interrupting(morel.evaluate_member, 4))
    stops = 0
    while True:
        try:
            resumed = train(tmp_path / "run")
            break
        except SystemExit as end:
            if end.code != 130:
                raise
            stops += 1
    assert stops >= 3
    assert "Stopped at update" in capsys.readouterr().err
    assert metrics(tmp_path / "run-world-model") == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, members)


def test_overwrite_empties_both_folders_before_training_begins(trained, train, tmp_path):
    """So that a policy never stands beside a world model from which it has not learned."""
    run_dir = tmp_path / "run"
    train(run_dir)
    model = tmp_path / "run-world-model"
    end = {"update": ARGS.total_updates, "seed": 0, "final/returns": [0.0]}
    (run_dir / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    with pytest.raises(SystemExit) as finished:
        train(run_dir)
    assert finished.value.code == 0

    def stop(run):
        run.stopping = True

    with pytest.raises(SystemExit) as stopped:
        train(run_dir, overwrite=True, between=stop)
    assert stopped.value.code == 130
    assert not (run_dir / "metrics.jsonl").exists()
    assert not (model / "members.msgpack").exists()
    assert metrics(model) == []
    train(run_dir)
    assert metrics(model) == metrics(trained[0])


def test_overwrite_leaves_the_world_model_of_another_script(trained, train, tmp_path):
    model = Path(shutil.copytree(trained[0], tmp_path / "run-world-model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"script": "combo_atari.py"}))
    with pytest.raises(SystemExit, match="run-world-model holds something else"):
        train(tmp_path / "run", overwrite=True)
    assert (model / "members.msgpack").exists()


def test_the_world_model_of_an_earlier_start_is_that_of_the_same_arguments(trained):
    model, _ = trained
    config = json.loads((model / "config.json").read_text())
    args = dataclasses.replace(
        ARGS, **{name: config["args"][name] for name in ("seed", "members", "model_updates")}
    )
    later = dataclasses.replace(args, total_updates=9 * args.total_updates, eval_every=7)
    assert morel.load_world_model(model, later, config["data"])
    for change in ({"seed": 7}, {"kl_coef": 5.0}, {"data_percent": 50.0}, {"model_updates": 999}):
        (name,) = change
        with pytest.raises(SystemExit, match=rf"model with {name} .*: .* or another --run-dir"):
            morel.load_world_model(model, dataclasses.replace(args, **change), config["data"])
    with pytest.raises(
        SystemExit, match=r"is a world model with data of crc32 \d+: give the same, or"
    ):
        morel.load_world_model(model, args, config["data"] | {"crc32": 1})


def test_a_world_model_of_another_run_is_taken_or_refused_with_one_sentence(trained, tmp_path):
    model, members = trained
    given = dataclasses.replace(ARGS, world_model=model)
    data = json.loads((model / "config.json").read_text())["data"]
    loaded = morel.load_world_model(model, given, data)
    words = [*TINY.split(), "--world-model", str(model), "--model-share", "0.25"]
    of_combo = tyro.cli(combo_atari.Args, args=words)
    assert combo_atari.load_world_model(model, of_combo, data) == loaded
    other_devices = dataclasses.replace(given, model_batch_size=33)  # that cannot share 32
    assert morel.load_world_model(model, other_devices, data) == loaded
    loaded = [*serialization.msgpack_restore(loaded).values()]
    for i in range(2):
        expected = jax.tree.map(lambda x, i=i: x[i], members)
        jax.tree.map(np.testing.assert_array_equal, loaded[i], expected)
    (tmp_path / "empty").mkdir()
    for folder, change, message in (
        (tmp_path / "nowhere", {}, "There is no trained world model in .*nowhere"),
        (tmp_path / "empty", {}, "There is no trained world model in .*empty"),
        (model, {"env_id": "Breakout"}, "a world model with env_id Pong: give"),
        (model, {"depth": 4, "members": 1}, "a world model with members 2, depth 2: give"),
        (model, {"clip_rewards": False}, "True: give the same, or another --world-model"),
        (model, {"kl_coef": 5.0}, "a world model with kl_coef 0.1: give the same"),
    ):
        with pytest.raises(SystemExit, match=message):
            morel.load_world_model(folder, dataclasses.replace(given, **change), data)
    with pytest.raises(
        SystemExit,
        match=r"is a world model with data of crc32 \d+, data of frames_crc32 \d+: give the same",
    ):
        morel.load_world_model(model, given, {"crc32": 1})
    (tmp_path / "empty" / "members.msgpack").touch()
    config = json.loads((model / "config.json").read_text()) | {"data": {}}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="is a world model with data of crc32 None: give the same"):
        morel.load_world_model(tmp_path / "empty", given, data)
    for config in ("[1]", '{"args": {}}', '{"args": 3}', '{"args": {}, "data": "old"}'):
        (tmp_path / "empty" / "config.json").write_text(config)
        with pytest.raises(SystemExit, match="There is no trained world model in"):
            morel.load_world_model(tmp_path / "empty", given, data)
    (tmp_path / "empty" / "config.json").write_bytes((model / "config.json").read_bytes())
    content = (model / "members.msgpack").read_bytes()
    for damaged in (content[:-1], b"", bytes(4)):
        (tmp_path / "empty" / "members.msgpack").write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"members\.msgpack is damaged"):
            morel.load_world_model(tmp_path / "empty", given, data)


@pytest.mark.parametrize(("saved", "message"), [(0, "trains"), (3, "There is no trained world")])
def test_a_policy_does_not_go_on_without_the_world_model_that_it_has_learned_from(
    saved, message, tmp_path, monkeypatch
):
    def train(*_):
        raise SystemExit("trains")

    monkeypatch.setattr(morel, "train_world_model", train)
    run = SimpleNamespace(dir=tmp_path / "run", saved=saved, config={"data": {}})
    with pytest.raises(SystemExit, match=message):
        morel.get_world_model(run, None, None, None, None, ARGS)


def test_the_optimizer_clips_each_gradient_and_decays_weights_alone(params):
    assert params["params"]["decoder"]["background"].ndim == 1  # so that it is not decayed
    optimizer = morel.model_optimizer(dataclasses.replace(ARGS, model_weight_decay=0.5))
    weights = {"kernel": jnp.ones((2, 2)), "background": jnp.ones(4)}
    gradient = {"kernel": jnp.full((2, 2), 300.0), "background": jnp.zeros(4)}
    delta, state = optimizer.update(gradient, optimizer.init(weights), weights)
    assert optax.tree.norm(optax.tree.get(state, "mu")) == pytest.approx(0.1 * 200)
    np.testing.assert_allclose(delta["kernel"], -3e-4 * (1 + 0.5), rtol=1e-3)
    assert not delta["background"].any()


def test_training_ends_when_the_heldout_loss_stays_and_keeps_the_best_members(
    train, store, first_members, tmp_path, monkeypatch
):
    """And learns from none of the episodes that are held out; members have keys of their own."""
    losses, seen, sample = iter((2.0, 3.0)), {1: set(), 2: set()}, morel.sample_windows
    numbers, given = {1: set(), 2: set()}, {1: set(), 2: set()}

    def note(keys, i: int):
        data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
        assert len(data) == 2  # each member has a key of its own
        given[i] |= data

    def sample_windows(part, number, length, num_members, args):
        numbers[num_members].add(number)
        seen[num_members] |= {*part.episodes["id"].tolist()}
        return sample(part, number, length, num_members, args)

    def update_model(state, windows, keys, *_):
        note(keys, 1)
        add = lambda m: m._replace(params=jax.tree.map(lambda x: x + 1, m.params))  # noqa: E731
        return state._replace(members=[*map(add, state.members)]), {"losses/total": np.ones(())}

    def evaluate_model(run, state, batches, keys, *_):
        note(keys, 2)
        return {"heldout/total": next(losses)}

    monkeypatch.setattr(morel, "sample_windows", sample_windows)
    monkeypatch.setattr(morel, "update_model", update_model)
    monkeypatch.setattr(morel, "evaluate_model", evaluate_model)
    members = train(tmp_path / "run", model_patience=4, model_eval_batches=3)
    final = metrics(tmp_path / "run-world-model")[-1]
    assert (final["final/updates"], final["final/best_update"]) == (8, 4)
    for i, first in enumerate(first_members):
        kernels = [x["params"]["encoder"]["Conv_0"]["kernel"] for x in (members, first)]
        np.testing.assert_allclose(kernels[0][i], kernels[1] + 4, rtol=1e-5)
    learned, heldout = morel.split_store(store, 30, ARGS.seed)
    assert set(range(8)) <= numbers[2]
    assert numbers[1] == {0, 1, 2}
    assert not given[1] & given[2]
    assert seen == {1: {*heldout.episodes["id"].tolist()}, 2: {*learned.episodes["id"].tolist()}}
    frames = morel.sample_batch(learned, ARGS.seed, 0, 512, 1).frames[:, 3]
    mean = np.asarray(morel.to_image(frames)).mean(axis=0).ravel()
    for background in members["params"]["decoder"]["background"]:
        np.testing.assert_allclose(background, mean + 4, atol=1e-5)


def test_a_heldout_loss_that_is_not_finite_ends_training(train, tmp_path, monkeypatch):
    monkeypatch.setattr(morel, "update_model", lambda s, *_: (s, {"losses/total": np.ones(())}))
    monkeypatch.setattr(morel, "evaluate_model", lambda *_: {"heldout/total": np.nan})
    with pytest.raises(SystemExit, match="is not finite by update 4"):
        train(tmp_path / "run")


def test_prediction_errors_are_those_of_frames_after_the_context_in_one_episode(params):
    """Where every prediction is the same grey."""
    decoder = jax.tree.map(jnp.zeros_like, params["params"]["decoder"])
    decoder |= {"background": jnp.full(84 * 84, 0.25)}
    grey = {"params": params["params"] | {"decoder": decoder}}
    windows = random_windows(3, 20)
    windows.is_first[2, 7] = True
    output = morel.evaluate_member(grey, windows, jax.random.key(0), NETWORK, ARGS)
    _, errors, inside, predicted = output
    assert inside == 2
    assert (predicted == 191).all()
    image = windows.frame[:2] / 255 - 0.5
    for step in (1, 5, 15):
        for name, other in (("error", 0.25), ("copy_error", image[:, 4])):
            expected = np.mean((image[:, 4 + step] - other) ** 2, axis=(1, 2)).sum()
            assert errors[f"heldout/{name}_{step}"] == pytest.approx(expected, rel=1e-4)


def test_predictions_follow_the_logged_actions_after_the_context(params):
    windows = random_windows(2, 20)
    images = jax.jit(partial(morel.predict_frames, NETWORK))(params, windows)
    states, *_ = OBSERVE(params, jax.tree.map(lambda x: x[:, :5], windows))
    state = jax.tree.map(lambda x: x[:, -1], states)
    other = IMAGINE(params, state, (windows.action[:, 5] + 1) % 6)
    assert np.abs(DECODE(params, other).image - images[:, 0]).max() > 1e-4
    for t in range(15):
        state = IMAGINE(params, state, windows.action[:, 5 + t])
        np.testing.assert_allclose(images[:, t], DECODE(params, state).image, atol=1e-5)


def test_heldout_metrics_are_means_over_members_and_batches(monkeypatch, tmp_path):
    def evaluate_member(params, windows, *_):
        x = params * windows
        return {"heldout/total": x}, {"heldout/error_1": x}, windows, np.zeros(1)

    monkeypatch.setattr(morel, "evaluate_member", evaluate_member)
    monkeypatch.setattr(morel, "draw_predictions", lambda *_: None)
    state = SimpleNamespace(members=[SimpleNamespace(params=x) for x in (1.0, 3.0)])
    run = SimpleNamespace(stopping=False, writes=True, dir=tmp_path)
    inputs = [2.0, 4.0], [0, 1], None, lambda x: x, ARGS
    found = morel.evaluate_model(run, state, *inputs)
    # (2 + 6 + 4 + 12) of four batches, and of 2 + 2 + 4 + 4 windows
    assert found == pytest.approx({"heldout/total": 6, "heldout/error_1": 2})


def test_the_time_of_a_policy_begins_after_its_world_model(trained, train):
    runs = []

    def earlier(run):
        run.started -= 10_000
        runs.append(run)

    train(trained[0].with_name("run"), between=earlier)
    assert time.monotonic() - runs[0].started < 5_000


def test_a_world_model_is_a_run_of_its_own_on_weights_and_biases(train, tmp_path, monkeypatch):
    said, ids = [], []

    def init(**options):
        assert options["reinit"] == "create_new"  # or the second would be the first
        ids.append(options["id"])
        name = options["dir"].name
        log = lambda values, step: said.append((name, step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda exit_code: said.append((name, exit_code)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=OSError))
    train(tmp_path / "run", track=True)
    lines = metrics(tmp_path / "run-world-model")
    expected = [{k: v for k, v in x.items() if k not in ("update", "seed")} for x in lines]
    model = [x for x in said if x[0] == "run-world-model"]
    assert [x[2] for x in model[:-1]] == expected
    assert model[-1] == ("run-world-model", 0)
    assert len({*ids}) == 2


def test_the_picture_has_real_frames_above_predicted_ones_of_one_episode_first(
    tmp_path, monkeypatch
):
    drawn = []
    save = lambda figure, *_, **__: drawn.append(figure.axes[0].images[0].get_array())  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    steps = np.array([-1, 0, 1, 2, 3, 5, 7, 10, 12, 15])  # after the fifth frame
    shade = np.arange(4)[:, None] * 60 + np.arange(20)
    frame = np.broadcast_to(shade[..., None, None], (4, 20, 84, 84)).astype(np.uint8)
    is_first = np.zeros((4, 20), bool)
    is_first[0, 7] = True
    windows = random_windows(4, 20)._replace(frame=frame, is_first=is_first)
    morel.draw_predictions(windows, frame[:, 5:] + 30, tmp_path / "world_model.png")
    tiles = np.asarray(drawn[0])[40::88, 40::88]  # a pixel of each
    expected = [shade[i, 4 + steps] + 30 * (row * (steps > 0)) for i in (1, 2, 3) for row in (0, 1)]
    np.testing.assert_array_equal(tiles, expected)
