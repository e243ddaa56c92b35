"""combo_atari.py: rollouts of the world model, the mix, the loss, its runs."""

import dataclasses
import difflib
import inspect
import math
import signal
from functools import partial
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from helpers import metrics
from scipy.special import logsumexp, softmax

import combo_atari as combo
import cql_atari as cql
import prepare_atari

pytestmark = pytest.mark.usefixtures("hurry")
SIZES = "--members 2 --deter 16 --hidden 16 --latents 4 --classes 4 --depth 2 --head-units 16"
ROLLOUTS = "--rollout-every 3 --rollout-starts 8 --rollout-length 6 --rollout-generations 2"
TINY = f"--env-id Pong {SIZES} {ROLLOUTS} --rollout-warm-up 5 --channels 4 --num-bins 21"
TINY += " --batch-size 4 --log-every 2 --eval-every 4 --checkpoint-every 2 --total-updates 10"
TINY += " --eval-episodes 1 --final-eval-episodes 1 --heldout-percent 30 --model-length 6"
TINY += " --eval-max-frames 40"
TINY += " --model-batch-size 2 --model-eval-every 2 --model-updates 2 --model-eval-batches 1"
ARGS = tyro.cli(combo.Args, args=TINY.split())
NETWORK, MODEL = combo.make_network(6, ARGS), combo.make_world_model(6, ARGS)
PREDICT = partial(combo.add_rollouts, network=NETWORK, model=MODEL, args=ARGS)
APPLY = jax.jit(NETWORK.apply)
# Of 20 transitions the last 8 come from the model.
LOSS_ARGS = {
    push_up: dataclasses.replace(
        ARGS, batch_size=20, model_share=0.4, cql_alpha=0.7, discount=0.9, push_up=push_up
    )
    for push_up in ("real", "mix")
}
LOSS = {
    push_up: jax.jit(partial(combo.combo_loss, network=NETWORK, args=args))
    for push_up, args in LOSS_ARGS.items()
}


@pytest.fixture(autouse=True, scope="module")
def without_blocks():
    """The gradient through them is tested in test_morel.py."""
    with pytest.MonkeyPatch.context() as patch:
        helpers.without_blocks(patch, "combo_atari", "cql_atari")
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store of eight short episodes of random frames."""
    path, rng = tmp_path_factory.mktemp("store") / "Pong-dqn-test", np.random.default_rng(0)
    meta = {"env_id": "Pong", "source": "dqn", "percent": 100.0, "num_actions": 6}
    meta |= {"steps_per_checkpoint": 100, "rom_sha256": None}
    episodes = []
    for i in range(8):
        frames = rng.integers(0, 256, (4 + i, 84, 84), dtype=np.uint8)
        action, reward = rng.integers(0, 6, len(frames)), rng.normal(size=len(frames))
        reward[-1] = 0
        episode = {"frames": frames, "action": action, "reward": reward}
        episodes.append(episode | {"is_terminal": i % 2 == 0})
    prepare_atari.write_store(path, meta, episodes)
    return path


@pytest.fixture(scope="module")
def store(path):
    return combo.open_store(dataclasses.replace(ARGS, dataset=path))


@pytest.fixture(scope="module")
def q_params():
    hurry = {"xla_backend_optimization_level": 0}  # it runs once
    init = jax.jit(NETWORK.init, compiler_options=hurry)
    params = init(jax.random.key(0), jnp.zeros((84, 84, 4), jnp.uint8))
    return helpers.with_noise(params, 0), helpers.with_noise(params, 1)


@pytest.fixture(scope="module")
def members():
    """Two members that say of every step: reward 0.25 or -0.5, and never terminal."""
    members = jax.tree.map(lambda *x: np.stack(x), *combo.init_members(jax.random.key(1), MODEL, 2))
    for name, bias in (("reward_head", (0.25, -0.5)), ("terminal_head", (-9.0, -9.0))):
        layer = members["params"][name]["Dense_0"]
        layer |= {"kernel": 0 * layer["kernel"], "bias": np.array(bias, np.float32)[:, None]}
    return members


def with_ends(members, bias: float = -24.0):
    """The same, but the logit of terminal depends on the state."""
    heads = members["params"]
    kernel = 5 * np.random.default_rng(2).normal(size=(2, 16, 1)).astype(np.float32)
    layer = {"kernel": kernel, "bias": np.full((2, 1), bias, np.float32)}
    return {"params": heads | {"terminal_head": heads["terminal_head"] | {"Dense_0": layer}}}


@pytest.fixture(scope="module")
def rollouts(store, q_params, members):
    """Two generations of members whose rollouts do end."""
    ring, members = combo.empty_rollouts(ARGS), with_ends(members)
    for generation in range(2):
        starts = combo.load_starts(store, generation, ARGS)
        inputs = (False, q_params[0], members, jax.random.key(3))
        ring = PREDICT(ring, starts, generation, *inputs)
    return jax.device_get(ring)


def test_nothing_counts_after_a_predicted_end(rollouts, store):
    ends = 0
    for g, n, e in np.ndindex(2, 4, 2):
        running = not combo.load_starts(store, g, ARGS).is_last[n, e, -1]
        for t in range(6):
            assert rollouts.valid[g, n, e, t] == running
            ends += running and rollouts.terminal[g, n, e, t]
            running &= not rollouts.terminal[g, n, e, t]
    assert 0 < ends < 16
    assert 0 < np.sum(rollouts.valid) < rollouts.valid.size


def test_every_transition_of_a_rollout_comes_from_one_member(store, q_params, members):
    ring, key = combo.empty_rollouts(ARGS), jax.random.key(0)
    starts = combo.load_starts(store, 0, ARGS)
    assert starts.frames.shape == (4, 2, 3 + 6, 84, 84)  # three before, then 1 + the five to filter
    ring = PREDICT(ring, starts, 0, False, q_params[0], members, key)
    np.testing.assert_allclose(ring.reward[0, :, 0], 0.25, rtol=1e-6)
    np.testing.assert_allclose(ring.reward[0, :, 1], -0.5, rtol=1e-6)
    assert not np.any(ring.valid[1])  # no second generation yet
    swapped = jax.tree.map(lambda x: x[::-1], members)
    other = PREDICT(combo.empty_rollouts(ARGS), starts, 0, False, q_params[0], swapped, key)
    np.testing.assert_allclose(other.reward[0, :, 0], -0.5, rtol=1e-6)
    assert np.mean(other.frames[0, :, :, 4:] != ring.frames[0, :, :, 4:]) > 0.5


def test_a_generation_is_that_of_its_actions_whatever_q_is(rollouts, store, q_params, members):
    """What a run that goes on relies upon."""
    members, key = with_ends(members), jax.random.key(3)
    starts = combo.load_starts(store, 1, ARGS)
    ring = combo.empty_rollouts(ARGS)._replace(action=rollouts.action + 0)
    replayed = PREDICT(ring, starts, 1, True, q_params[1], members, key)
    ring = combo.empty_rollouts(ARGS)._replace(action=rollouts.action + 0)
    anew = PREDICT(ring, starts, 1, False, q_params[1], members, key)
    for ours, theirs in zip(replayed, rollouts, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])
    assert np.any(anew.action[1] != rollouts.action[1])


def test_a_rollout_against_a_loop(rollouts, store, q_params, members):
    """Warm-up, Q's actions on stacks of frames, predictions: one step after the other."""
    members, starts = with_ends(members), combo.load_starts(store, 0, ARGS)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 2)
    filter_states = jax.jit(partial(combo.observe, MODEL))
    imagine = jax.jit(partial(combo.imagine, MODEL))
    decode = jax.jit(partial(MODEL.apply, method="decode"))
    read = jax.jit(lambda params, x: combo.to_scalar(NETWORK.apply(params, x)))
    greedy = 0
    for e in range(2):
        member = jax.tree.map(lambda x: x[e], members)  # noqa: B023
        batch = jax.tree.map(lambda x: x[:, e], starts)  # noqa: B023
        windows = combo.model_windows(batch, ARGS.clip_rewards)
        filter_key, key = jax.random.split(keys[e])
        states, *_ = filter_states(member, windows, filter_key)
        state = jax.tree.map(lambda x: x[:, -1], states)
        for t, step_key in enumerate(jax.random.split(key, 6)):
            frames = np.array(rollouts.frames[0, :, e, t : t + 4])  # [N, 4, 84, 84]
            best = np.argmax(read(q_params[0], np.moveaxis(frames, 1, -1)), axis=-1)
            action = rollouts.action[0, :, e, t]
            greedy += np.sum(best == action)
            _, latent_key = jax.random.split(step_key)
            state = imagine(member, state, action, latent_key)
            image, reward, logit = decode(member, state)
            frame = np.clip(np.round((np.array(image) + 0.5) * 255), 0, 255)
            difference = np.abs(frame - rollouts.frames[0, :, e, 4 + t])
            assert difference.max() <= 1  # a rounding
            np.testing.assert_allclose(reward, rollouts.reward[0, :, e, t], atol=1e-5)
            np.testing.assert_array_equal(logit > 0, rollouts.terminal[0, :, e, t])
    assert 40 <= greedy <= 48  # ε = 0.05


def test_a_rollout_starts_with_the_stack_of_its_logged_frame(rollouts, store):
    """Zeros stand for frames from before the episode, as in the environment."""
    begins, num_steps = store.episodes["start"], len(store.index)  # its rows are all in order
    np.testing.assert_array_equal(store.index, np.arange(num_steps))
    everything = combo.read_frames(store, store.index)
    short = 0
    for g in range(2):
        rng = np.random.default_rng((ARGS.seed, 2**31 + g))
        last = (rng.integers(num_steps, size=8) + 5) % num_steps
        for i, position in enumerate(last):
            begin = begins[begins <= position].max()
            stack = [
                everything[p] if p >= begin else np.zeros((84, 84), np.uint8)
                for p in range(position - 3, position + 1)
            ]
            np.testing.assert_array_equal(rollouts.frames[g, i // 2, i % 2, :4], np.stack(stack))
            short += position - 3 < begin
    assert 0 < short < 16


def test_epsilon_greedy_is_random_with_its_probability():
    q = jnp.tile(jnp.array([0.0, 2.0, 1.0]), (5000, 1))
    actions = combo.epsilon_greedy(q, jax.random.key(0), 0.3)
    assert np.mean(np.array(actions) != 1) == pytest.approx(0.2, abs=0.02)  # 0.3 · 2/3
    assert set(combo.epsilon_greedy(q, jax.random.key(0), 0.0).tolist()) == {1}


def test_the_mix_has_its_share_and_its_model_part_is_what_was_predicted(rollouts, store):
    """Against a search of every drawn transition in the rollouts; all are drawn alike."""
    args = dataclasses.replace(ARGS, batch_size=400, model_share=0.75)
    real = combo.sample_batch(store, 0, 0, 100, 2)
    batch = jax.jit(partial(combo.mix_batch, args=args))(real, rollouts, jax.random.key(0))
    assert batch.action.shape == (400, 2)
    for ours, logged in zip(batch, real, strict=True):
        assert ours.dtype == logged.dtype
        np.testing.assert_array_equal(ours[:100], logged)
    transitions = {}
    for g, n, e, t in np.ndindex(rollouts.valid.shape):
        if rollouts.valid[g, n, e, t]:
            frames = np.array(rollouts.frames[g, n, e, t : t + 5])
            transitions[frames.tobytes()] = (g, n, e, t)
    drawn = []
    for i in range(100, 400):
        index = transitions[np.array(batch.frames[i]).tobytes()]
        drawn.append(index)
        assert batch.action[i, 0] == rollouts.action[index]
        assert batch.reward[i, 0] == rollouts.reward[index]
        assert batch.is_terminal[i, 1] == rollouts.terminal[index]
        assert not batch.is_last[i, 0]
    assert np.any(batch.is_terminal[100:, 1])
    assert len(set(drawn)) > 0.9 * len(transitions)
    now, after = np.moveaxis(combo.stack_frames(batch.frames, batch.history), 1, 0)
    for i, (g, n, e, t) in enumerate(drawn, start=100):
        for k in range(4):  # stacks, newest frame last
            np.testing.assert_array_equal(now[i, ..., k], rollouts.frames[g, n, e, t + k])
            np.testing.assert_array_equal(after[i, ..., k], rollouts.frames[g, n, e, t + 1 + k])


def test_rollouts_that_do_not_count_are_last_steps(store):
    real = combo.sample_batch(store, 0, 0, 2, 2)
    batch = combo.mix_batch(real, combo.empty_rollouts(ARGS), jax.random.key(0), ARGS)
    assert np.all(batch.is_last[2:, 0])


def to_value(logits) -> np.ndarray:
    y = softmax(logits, axis=-1) @ (np.arange(21) - 10)
    u = np.abs(y) + 1.001
    return np.sign(y) * ((2 * u / (1 + np.sqrt(1 + 0.004 * u))) ** 2 - 1)


@pytest.fixture(scope="module")
def batch(store, rollouts) -> combo.Batch:
    """A mix in which the model ends some rollouts, and some are cut at the horizon."""
    real = combo.sample_batch(store, 0, 1, 12, 2)
    mix = jax.jit(partial(combo.mix_batch, args=LOSS_ARGS["real"]))
    return mix(real, rollouts, jax.random.key(8))


@pytest.mark.parametrize("push_up", ["real", "mix"])
def test_the_loss_against_a_loop(push_up, batch, rollouts, q_params):
    """An end is not bootstrapped, the horizon of a rollout is."""
    total, metrics = LOSS[push_up](*q_params, batch)
    ends, last = np.array(batch.is_terminal[12:, 1]), np.array(rollouts.frames[:, :, :, -1])
    at_horizon = [np.any(np.all(last == x[-1], axis=(-2, -1))) for x in batch.frames[12:]]
    assert 0 < np.sum(ends) < 8
    assert np.any(at_horizon & ~ends)
    observation = jnp.moveaxis(combo.stack_frames(batch.frames, batch.history), 1, 0)
    logits = np.array(APPLY(q_params[0], observation[0]), float)
    next_q = to_value(np.array(APPLY(q_params[1], observation[1]), float)).max(axis=-1)
    q = to_value(logits)
    td_loss = down = up = y_mean = gap = 0.0
    counts = ~np.array(batch.is_last[:, 0])
    weight = counts.sum() / counts[:12].sum()  # so that a constant added to Q changes nothing
    values, rewards = ({True: [], False: []} for _ in range(2))
    for i in range(20):
        is_real, action = i < 12, int(batch.action[i, 0])
        if batch.is_last[i, 0]:
            assert is_real
            continue
        reward = float(np.clip(batch.reward[i, 0], -1, 1))
        y = reward if batch.is_terminal[i, 1] else reward + 0.9 * next_q[i]
        td_loss += helpers.two_hot_cross_entropy(y, logits[i, action]) / 20
        y_mean += y / 20
        gap += (logsumexp(q[i]) - q[i, action]) / 20
        down += logsumexp(q[i]) / 20
        if push_up == "mix":
            up += q[i, action] / 20
        elif is_real:
            up += weight * q[i, action] / 20
        values[is_real].append(q[i, action])
        rewards[is_real].append(reward)
    assert np.abs(next_q[12:]).min() > 0.01  # so that a bootstrap shows
    assert metrics["losses/td"] == pytest.approx(td_loss, rel=1e-4)
    assert metrics["losses/conservative"] == pytest.approx(0.7 * (down - up), rel=1e-3)
    assert total == pytest.approx(td_loss + 0.7 * (down - up), rel=1e-3)
    counted = len(values[True]) + len(values[False])
    assert metrics["charts/q"] == pytest.approx(sum(values[True] + values[False]) / 20, rel=1e-3)
    assert metrics["charts/q_target"] == pytest.approx(y_mean, rel=1e-3)
    assert metrics["charts/gap"] == pytest.approx(gap, rel=1e-3)
    assert metrics["charts/q_min"] == pytest.approx(q[counts].min(), rel=1e-3)
    assert metrics["charts/model_share"] == pytest.approx(8 / counted)
    for name, is_real in (("real", True), ("model", False)):
        assert metrics[f"charts/q_{name}"] == pytest.approx(np.mean(values[is_real]), rel=1e-3)
        assert metrics[f"charts/reward_{name}"] == pytest.approx(np.mean(rewards[is_real]))


def constant_q(params, values):
    """Parameters whose Q is `values`, one for each action, in every state."""
    head = dict(params["params"]["Head_0"])
    name = max(head, key=lambda n: head[n]["bias"].size if "bias" in head[n] else 0)
    logits = 60 * combo.two_hot(jnp.array(values), 21)  # one of them has nearly all the weight
    zero = jax.tree.map(jnp.zeros_like, head[name])
    head[name] = zero | {"bias": logits.ravel()}
    return {"params": params["params"] | {"Head_0": head}}


@pytest.mark.parametrize(("push_up", "pushed"), [("real", 0), ("mix", 5 / 20)])
def test_the_penalty_has_the_value_computed_by_hand(push_up, pushed, q_params):
    """Q(s, 0) = v, else 0, in every state; 5 of 20 transitions have action 0, all predicted.

    So Σ exp Q = exp v + 5, and the mean Q of the actions is 0 on data and v/4 on the mix.
    """
    v = float(combo.inverse_transform(jnp.float32(1.0)))  # 3.0 but for ε
    params = constant_q(q_params[0], [v, 0, 0, 0, 0, 0])
    action = np.array([[1, 2, 3, 4] * 3 + [0] * 5 + [5] * 3, [0] * 20], np.int32).T
    frames, none = np.zeros((20, 5, 84, 84), np.uint8), np.zeros((20, 2), bool)
    reward, history = np.zeros((20, 2), np.float32), np.full((20, 2), 3, np.uint8)
    batch = combo.Batch(frames, history, action, reward, none, none)
    _, metrics = LOSS[push_up](params, params, batch)
    expected = 0.7 * (math.log(math.exp(v) + 5) - pushed * v)
    assert metrics["losses/conservative"] == pytest.approx(expected, rel=1e-4)
    assert metrics["charts/q_real"] == pytest.approx(0, abs=1e-4)
    assert metrics["charts/q_model"] == pytest.approx(v * 5 / 8, rel=1e-4)


def test_with_push_up_mix_the_loss_is_that_of_cql(batch, q_params):
    args = cql.Args(num_bins=21, channels=4, cql_alpha=0.7, discount=0.9)
    loss = jax.jit(partial(cql.cql_loss, network=cql.make_network(6, args), args=args))
    expected, theirs = loss(*q_params, batch)
    ours, metrics = LOSS["mix"](*q_params, batch)
    assert ours == pytest.approx(float(expected), rel=1e-6)
    for name, value in theirs.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    sources = (inspect.getsource(x).splitlines() for x in (cql.cql_loss, combo.combo_loss))
    removed = [x[2:] for x in difflib.ndiff(*sources) if x[0] == "-"]
    words = ("def ", '"""', "conservative", "}")
    assert [x for x in removed if not any(word in x for word in words)] == []


def test_the_gradient_reaches_every_parameter(batch, q_params):
    gradient, _ = jax.jit(jax.grad(LOSS["real"], has_aux=True))(*q_params, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.fixture
def run(path, cache_dir, tmp_path, monkeypatch):
    """Runs main in this process, with games of one step: run("folder", "--seed", 1).

    Runs of the same arguments share their compiled programs. `stop` names the function at whose
    call Ctrl-C is pressed.
    """
    handlers = {}

    def play(act, *_):
        action = act(np.zeros((1, 84, 84, 4), np.uint8), jax.random.key(0))
        return None if action is None else [float(action[0])]

    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(combo, "evaluate", play)
    monkeypatch.setattr(combo, "draw_predictions", lambda *_: None)  # slow; test_world_model.py
    monkeypatch.setattr(combo.Run, "plot", lambda *_: None)  # slow; test_runs_atari.py
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))

    def start(folder, *arguments, stop=None):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        options = [*TINY.split(), "--dataset", path, "--run-dir", "run", *arguments]
        args = tyro.cli(combo.Args, args=[str(option) for option in options])
        with monkeypatch.context() as patch:
            if stop:
                original = getattr(combo, stop)

                def interrupt(*inputs, **options):
                    handlers[signal.SIGINT](signal.SIGTERM, None)
                    return original(*inputs, **options)

                patch.setattr(combo, stop, interrupt)
            combo.main(args)

    return start


@pytest.fixture
def world_model(members, store, tmp_path):
    folder = tmp_path / "world-model"
    helpers.save_world_model(folder, ARGS, with_ends(members), store.facts)
    return folder


def test_a_run_that_is_stopped_between_two_generations_goes_on_exactly(
    run, world_model, members, store, tmp_path, capsys, monkeypatch
):
    options = ["--eval-every", 8, "--checkpoint-every", 5, "--rollout-every", 3]
    options += ["--total-updates", 24, "--world-model", world_model]
    run("whole", *options)
    whole = metrics(tmp_path / "whole" / "run")
    losses = [x for x in whole if "losses/total" in x]
    assert [x["update"] for x in losses] == list(range(2, 25, 2))
    assert all(0.3 < x["charts/model_share"] < 0.9 for x in losses)
    assert len({x["charts/masked"] for x in losses}) > 5
    stops = [("evaluate", 8), ("add_rollouts", 8), ("update", 9), ("add_rollouts", 9)]
    for stop, update in [*stops, ("evaluate", 16), ("finish_run", 24)]:
        with pytest.raises(SystemExit, match="130"):
            run("stopped", *options, stop=stop)
        assert f"Stopped at update {update}; the same" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(combo, "add_rollouts", None)  # for the final evaluation nothing is predicted
        run("stopped", *options)
    assert metrics(tmp_path / "stopped" / "run") == whole
    helpers.save_world_model(world_model, ARGS, with_ends(members, bias=-23.0), store.facts)
    with pytest.raises(SystemExit, match=r"holds something else .*world_model_crc32"):
        run("stopped", *options)  # which is finished
    own = (tmp_path / "stopped" / "run-world-model").absolute()
    helpers.save_world_model(own, ARGS, with_ends(members), store.facts)
    with pytest.raises(SystemExit, match="0"):  # the same, now as the run's own
        run("stopped", *options[:-2])
    lines = tmp_path / "stopped" / "run" / "metrics.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))  # not finished
    helpers.save_world_model(own, ARGS, with_ends(members, bias=-23.0), store.facts)
    with pytest.raises(SystemExit, match="holds a run with another world model"):
        run("stopped", *options[:-2])


def test_each_update_mixes_other_logged_and_predicted_transitions(run, world_model, monkeypatch):
    logged, drawn = [], []

    def note(state, key, batch, *_):
        logged.append(np.array(batch.frames[:2]).tobytes())
        drawn.append(np.array(batch.frames[2:]).tobytes())  # the half that is predicted
        if len(drawn) == 3:
            raise SystemExit(7)
        return state._replace(step=state.step + 1), {"losses/total": jnp.float32(0)}

    monkeypatch.setattr(combo, "update", note)
    with pytest.raises(SystemExit, match="7"):
        run("run", "--world-model", world_model)
    assert len(set(logged)) == len(set(drawn)) == 3


def test_q_starts_as_in_cql_atari(run, path, world_model, tmp_path, monkeypatch):
    states = {}

    def note(self, state):
        states[type(self).__module__] = state.params
        raise SystemExit(7)

    for module in (combo, cql):
        monkeypatch.setattr(module.Run, "restore", note)
    with pytest.raises(SystemExit, match="7"):
        run("run", "--world-model", world_model)
    args = {k: v for k, v in vars(ARGS).items() if k in cql.Args.__dataclass_fields__}
    args |= {"dataset": path, "run_dir": tmp_path / "cql"}
    with pytest.raises(SystemExit, match="7"):
        cql.main(cql.Args(**args))
    assert {*states} == {"combo_atari", "cql_atari"}
    jax.tree.map(np.testing.assert_array_equal, *states.values())


def test_a_world_model_that_does_not_fit_is_refused_with_one_sentence(run, world_model, tmp_path):
    with pytest.raises(SystemExit, match="a world model with depth 2: give the same"):
        run("run", "--world-model", world_model, "--depth", 3)
    with pytest.raises(SystemExit, match="There is no trained world model in"):
        run("other", "--world-model", tmp_path)
    lines = tmp_path / "run" / "run" / "metrics.jsonl"
    lines.parent.mkdir(parents=True)
    lines.write_text("{}\n")
    with pytest.raises(SystemExit, match="There is no trained world model in"):
        run("run", "--overwrite", "--world-model", tmp_path)
    assert lines.exists()


def check(args) -> None:
    combo.check_args(args, combo.RANGES)
    combo.check_mix(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_starts": 6}, "--rollout-starts 6 must be a multiple of --members 4"),
        ({"model_share": 1.0}, "--model-share 1.0 of --batch-size 512 leaves no logged"),
        ({"model_share": 0.0}, "cql_atari.py is COMBO without"),
    ],
)
def test_bad_arguments_give_one_sentence(change, message):
    with pytest.raises(SystemExit, match=message):
        check(combo.Args(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "--batch-size times --model-share is 6, which cannot be shared by 4"),
        ({"rollout_starts": 8}, "--rollout-starts / --members is 2, which cannot be shared by 4"),
        ({"model_batch_size": 6}, "--model-batch-size 6 cannot be shared by 4 devices; give a"),
    ],
)
def test_what_several_devices_cannot_share_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    check(combo.Args())
    with pytest.raises(SystemExit, match=message):
        check(combo.Args(**change))


def test_a_run_takes_as_many_cores_as_its_parts_can_share(monkeypatch):
    """Real and predicted rows and the rollouts of a member, too, on a machine of 16 cores."""
    chosen = {}
    config = SimpleNamespace(jax_num_cpu_devices=-1, update=chosen.__setitem__)
    monkeypatch.setattr(combo, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(combo.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(combo, "prepare_jax", lambda: exit("here"))
    for settings, devices in (((16, 2048, 0.5), 8), ((512, 2048, 0.3), 2), ((512, 2000, 0.5), 4)):
        names = ("batch_size", "rollout_starts", "model_share")
        with pytest.raises(SystemExit, match="here"):
            combo.main(combo.Args(**dict(zip(names, settings, strict=True))))
        assert chosen["jax_num_cpu_devices"] == devices


def test_acting_is_at_random_with_the_probability_of_eval_epsilon(q_params):
    args = dataclasses.replace(ARGS, eval_epsilon=1.0, rollout_epsilon=0.0)
    inputs = q_params[0], jnp.zeros((64, 84, 84, 4), jnp.uint8), jax.random.key(0)
    actions = [set(combo.act(*inputs, greedy, NETWORK, args).tolist()) for greedy in (True, False)]
    assert [len(x) for x in actions] == [1, 6]


def test_rollouts_explore_with_their_own_probability(store, q_params, members, monkeypatch):
    given = []

    def greedy(q, key, epsilon):
        given.append(epsilon)
        return jnp.argmax(q, axis=-1)

    monkeypatch.setattr(combo, "epsilon_greedy", greedy)
    args = dataclasses.replace(ARGS, rollout_epsilon=0.25, eval_epsilon=0.75)
    inputs = combo.empty_rollouts(args), combo.load_starts(store, 0, args), 0, False, q_params[0]
    program = partial(combo.add_rollouts, network=NETWORK, model=MODEL, args=args)
    jax.eval_shape(program, *inputs, members, jax.random.key(0))
    assert set(given) == {0.25}
