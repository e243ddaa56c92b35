"""Numbers that are out of range, and what else the scripts say of their arguments."""

import dataclasses
import importlib
import math

import helpers
import pytest
import tyro

# A number's refused values by name; a script is asked about those that it has.
ALL = {
    "seed": [-1, 2**40], "total_updates": [0, -5], "log_every": [0, -1], "eval_every": [0, -1],
    "checkpoint_every": [0, -1], "data_percent": [0.0, -1.0, 100.5, math.nan, math.inf],
    "batch_size": [0, -4], "learning_rate": [0.0, -1e-3, math.nan, math.inf, 2.0],
    "weight_decay": [-1.0, math.nan, math.inf], "max_grad_norm": [0.0, -1.0, math.nan, math.inf],
    "learning_rate_decay": [0.0, -0.1, 1.5, math.nan], "eval_episodes": [-1],
    "final_eval_episodes": [-1], "eval_max_frames": [3],
    # Atari
    "rlu_run": [0, 6], "loader_threads": [0, -1, 257], "channels": [0, 1, -2],
    # BSuite
    "num_seeds": [0, -1, 10_001], "noise": [-0.1, 1.1, math.nan], "dynamics_hidden": [0],
    "critic_hidden": [0],
    # of some algorithms
    "num_bins": [0, 1, 2], "target_update_every": [0, -1],
    "discount": [-0.1, 1.01, math.nan, math.inf], "unroll_steps": [0, -1], "td_steps": [0, -1],
    "num_samples": [0, 10**5], "policy_coef": [-1.0, math.nan], "value_coef": [-1.0, math.inf],
    "behavior_coef": [-1.0, math.nan], "num_simulations": [0, 10**5], "max_depth": [0, -1],
    "dirichlet_fraction": [-0.1, 1.1, math.nan], "eval_dirichlet_fraction": [-0.1, 1.1],
    "mpo_temperature": [0.0, -1.0, math.nan], "beta": [0.0, -1.0, math.nan, math.inf],
    "num_action_samples": [0, 10**5], "cql_alpha": [-1.0, math.nan], "eval_epsilon": [-0.1, 1.1],
    # model-based
    "members": [0, -1], "deter": [0], "hidden": [0], "latents": [0], "classes": [0], "depth": [0],
    "heldout_percent": [0.0, 100.0, math.nan], "model_updates": [0], "model_batch_size": [0],
    "model_learning_rate": [0.0, math.nan, 2.0], "kl_balance": [-0.1, 1.1],
    "model_max_grad_norm": [0.0], "model_min_improvement": [-0.1, 1.1],
    "halt_quantile": [-0.1, 1.1], "head_units": [0], "model_length": [0],
    "model_weight_decay": [-1.0, math.nan], "kl_coef": [-1.0, math.nan], "model_eval_every": [0],
    "model_eval_batches": [0], "model_patience": [0], "halt_batches": [0], "warm_up": [0],
    "halt_penalty": [math.nan, 1.0, -math.inf], "bc_updates": [-1], "bc_batch_size": [0],
    "anneal_updates": [0], "clip_ratio": [-0.1, math.nan], "entropy_coef": [-1.0, math.nan],
    "rollout_generations": [0], "rollout_warm_up": [0],
    "gae_lambda": [-0.1, 1.1], "bc_learning_rate": [0.0], "rollout_epsilon": [-0.1, 1.1],
    "model_share": [-0.1, 1.1], "rollout_length": [0], "horizon": [0], "epochs": [0],
    "minibatches": [0], "starts": [0], "rollout_every": [0], "rollout_starts": [0],
}  # fmt: skip
MORE = {"morel_atari": {"members": [1], "warm_up": [3]}}
# Numbers at the ends of their ranges.
ALLOWED = {
    "seed": [0, 2**31], "data_percent": [100.0, 1e-3], "eval_episodes": [0], "noise": [0.0, 1.0],
    "final_eval_episodes": [0], "eval_max_frames": [4], "discount": [0.0, 1.0],
    "num_bins": [3, 601], "log_every": [1],
    "weight_decay": [0.0], "learning_rate_decay": [1.0], "rlu_run": [1, 5], "channels": [2],
    "policy_coef": [0.0], "value_coef": [0.0], "behavior_coef": [0.0], "unroll_steps": [1],
    "td_steps": [1], "num_samples": [1], "num_simulations": [1], "eval_epsilon": [0.0, 1.0],
    "cql_alpha": [0.0], "dirichlet_fraction": [0.0, 1.0], "num_action_samples": [1],
}  # fmt: skip
by_script = pytest.mark.parametrize("name", helpers.SCRIPTS)


@by_script
def test_help_fits_a_narrow_terminal_and_says_each_default_once(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        tyro.cli(importlib.import_module(name).Args, args=["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(line.strip("│ ") for line in text.splitlines())
    fields = len(dataclasses.fields(importlib.import_module(name).Args))
    assert said.count("(default:") == said.lower().count("default") == fields
    assert "[-changes]/seed" in said  # in one piece


@pytest.mark.parametrize("name", ["bc_bsuite.py", "benchmark/run.py"])
def test_help_keeps_the_lines_of_the_header(script, name):
    result = script(name, "--help", COLUMNS="80")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"    python {name}" in result.stdout


@by_script
def test_numbers_out_of_range_give_one_sentence(name):
    module = importlib.import_module(name)
    args = module.Args()
    module.check_args(args, module.RANGES)
    for field in dataclasses.fields(args):
        numeric = type(field.default) in (int, float) or "None" in str(field.type)
        if numeric and "Path" not in str(field.type) and field.name not in ALL:
            raise AssertionError(f"--{field.name} is not in the table")
        for value in ALL.get(field.name, []) + MORE.get(name, {}).get(field.name, []):
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(SystemExit) as end:
                module.check_args(dataclasses.replace(args, **{field.name: value}), module.RANGES)
            assert str(end.value.code).startswith(f"{flag} is {value}; give "), end.value
        for value in ALLOWED.get(field.name, []):
            module.check_args(dataclasses.replace(args, **{field.name: value}), module.RANGES)


@by_script
def test_ranges_are_of_arguments_that_exist(name):
    module = importlib.import_module(name)
    assert set(module.RANGES) <= {field.name for field in dataclasses.fields(module.Args)}


def test_a_batch_that_devices_cannot_share_gives_one_sentence(monkeypatch):
    module = importlib.import_module("rosmo_atari")
    monkeypatch.setattr(module.jax, "device_count", lambda: 3)
    with pytest.raises(SystemExit, match="--batch-size 512 cannot be shared by 3 devices"):
        module.check_args(module.Args(), module.RANGES)
    module.check_args(module.Args(batch_size=510), module.RANGES)
