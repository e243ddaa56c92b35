"""Rules that every script keeps."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib

import helpers
import pytest
from helpers import ROOT

SCRIPTS = [ROOT / f"{name}.py" for name in helpers.SCRIPTS]
PROGRAMS = [*SCRIPTS, *sorted((ROOT / "benchmark").glob("*.py"))]
MODULES = {path.stem for path in PROGRAMS}
by_name = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
by_program = pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)


def metadata(path) -> dict:
    """The inline metadata of a script (PEP 723)."""
    match = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    assert match, "no inline metadata at the top"
    return tomllib.loads(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))


def args_class(path) -> ast.ClassDef:
    (args,) = [
        x
        for x in ast.parse(path.read_text()).body
        if isinstance(x, ast.ClassDef) and x.name == "Args"
    ]
    return args


def imports(path, top_level: bool = False) -> set[str]:
    """The packages that a program imports, or those of its top level alone."""
    tree, names = ast.parse(path.read_text()), set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@by_program
def test_metadata_pins_the_versions_of_requirements(path):
    if "# /// script" not in path.read_text():
        assert path not in SCRIPTS
        return
    pinned = dict(
        line.split(";")[0].strip().lower().split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    data = metadata(path)
    assert data["requires-python"] == ">=3.11,<3.14"
    for requirement in data["dependencies"]:
        name, _, pin = re.sub(r"\[.*\]", "", requirement).partition("==")
        assert pinned.get(name.lower()) == pin, requirement


@by_program
def test_metadata_names_every_package_that_is_imported(path):
    if "# /// script" not in path.read_text():
        return
    distributions = {
        "ale_py": "ale-py", "cv2": "opencv-python-headless", "orbax": "orbax-checkpoint",
        "tensorflow_datasets": "tensorflow-datasets",
    }  # fmt: skip
    imported = imports(path) - set(sys.stdlib_module_names) - MODULES
    named = {re.split(r"[=\[]", x)[0] for x in metadata(path)["dependencies"]}
    # It converts TFDS folders, too, which few need and whose packages are large.
    optional = {"tensorflow-datasets"} if path.stem == "collect_bsuite" else set()
    missing = {distributions.get(name, name) for name in imported} - named - optional
    assert not missing


@by_name
def test_every_argument_is_documented_and_read(path):
    """By the comment behind it or the text below it; tyro shows either."""
    text, args = path.read_text(), args_class(path)
    attributes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) in ("args", "self.args")}
    for field, following in zip(args.body, [*args.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        line = text.splitlines()[field.end_lineno - 1]
        comment = line[len(ast.get_source_segment(text, field).splitlines()[-1]) + 4 :]
        is_text = isinstance(following, ast.Expr) and following.value.value.strip()
        assert re.fullmatch(r"  # \S.*", comment) or is_text, f"nothing says what {line} is"
        assert field.target.id in read, f"nothing reads it: {line}"


@by_program
def test_the_header_that_help_shows_has_79_columns(path):
    if "description=" in path.read_text():
        head = ast.get_docstring(ast.parse(path.read_text()))
        head = head.split("\n\nWhere")[0] if path in SCRIPTS else head
        assert max(map(len, head.splitlines())) <= 79


@by_name
def test_a_script_imports_nothing_of_the_repository(path):
    assert not imports(path) & (MODULES | {"benchmark", "tests", "helpers"})


HEAVY = {"tensorflow", "tensorflow_datasets", "cv2", "orbax", "wandb", "rlax"}


@by_name
def test_training_needs_neither_tensorflow_nor_opencv_nor_orbax(path):
    """And Weights & Biases only with --track."""
    assert not imports(path) & (HEAVY - {"wandb"})
    assert not imports(path, top_level=True) & (HEAVY | {"matplotlib"})


def test_importing_a_script_touches_nothing(tmp_path):
    """No device, no file, no package that training does not need, no command line."""
    names = [path.stem for path in SCRIPTS]
    code = (
        "import importlib, json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv = ['x', '--nonsense']\n"
        f"heavy = {HEAVY | {'matplotlib.pyplot'}}\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    from jax._src import xla_bridge\n"
        "    ready = xla_bridge.backends_are_initialized()\n"
        "    print(json.dumps([name, ready, sorted(heavy & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [name for name, *_ in lines] == names
    for name, initialized, heavy in lines:
        assert not initialized, name
        assert not heavy, name
    assert list(tmp_path.iterdir()) == []


@by_name
def test_no_function_has_a_hidden_key(path):
    """A literal seed in the middle of a function makes every seed the same."""
    assert not re.search(r"(PRNGKey|random\.key)\(\d+\)", path.read_text())


def test_the_algorithm_comes_first():
    """The paper's first formula stands above line 300, the loss above the run folder."""
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        begin = args_class(path).end_lineno
        formula = re.compile(r"Eq\. |\(Appendix A")
        first = next((i for i, x in enumerate(lines, 1) if i > begin and formula.search(x)), 9999)
        if path.stem.startswith(("rosmo", "muzero_unplugged")):
            assert first < 300, path.stem
        names = [x.split()[2] for x in lines if x.startswith("# --- ") and "(identical" in x]
        blocks = ["data", "evaluate", "run", "checks", "entry"]
        assert [names.index(block) for block in blocks] == sorted(map(names.index, blocks))
        loss = next(i for i, x in enumerate(lines) if re.match(r"def \w+_loss\(", x))
        run_folder = next(i for i, x in enumerate(lines) if x.startswith("# --- run folder"))
        assert loss < run_folder, path.stem


SHARED = {"total_updates": 200_000, "weight_decay": 1e-4, "learning_rate": 7e-4}
SHARED |= {"learning_rate_decay": 0.1, "max_grad_norm": 5.0}
MUZERO = {"discount": 0.997**4, "target_update_every": 200, "unroll_steps": 5}
MUZERO |= {"value_coef": 0.25, "policy_coef": 1.0}
TABLE3 = SHARED | {"batch_size": 512, "data_percent": 100.0}
TABLE4 = SHARED | {"batch_size": 128, "data_percent": 100.0, "num_seeds": 5}
ATARI, BSUITE = MUZERO | {"td_steps": 5}, MUZERO | {"td_steps": 3, "dynamics_hidden": 256}
ROSMO = {"behavior_coef": 0.2, "num_samples": None, "behavior_advantage": "model"}
CRR = {"discount": 0.99, "target_update_every": 100, "weight": "exp", "num_action_samples": None}
CQL = {"discount": 0.99, "target_update_every": 2_000, "cql_alpha": 1.0, "eval_epsilon": 0.001}
PPO = {"batch_size": 64, "rollout_length": 128, "epochs": 4, "minibatches": 4, "gae_lambda": 0.95}
PPO |= {"learning_rate": 2.5e-4, "clip_ratio": 0.1, "entropy_coef": 0.01, "value_coef": 0.5}
PPO |= {"max_grad_norm": 0.5, "discount": 0.99}  # CleanRL's, but for the first
WORLD_MODEL = {"model_updates": 200_000, "model_batch_size": 32, "model_length": 48}
WORLD_MODEL |= {"model_learning_rate": 3e-4, "model_weight_decay": 0.01, "kl_coef": 0.1}
WORLD_MODEL |= {"model_max_grad_norm": 200.0, "kl_balance": 0.8, "model_patience": 10_000}
WORLD_MODEL |= {"model_min_improvement": 0.005, "heldout_percent": 5.0, "clip_rewards": True}
MOREL = {"members": 4, "discrepancy": "frame", "halt_quantile": 0.999, "halt_batches": 16}
MOREL |= {"halt_penalty": -10.0, "horizon": 50, "warm_up": 16, "starts": 4, "eval_every": 50}
MOREL |= {"bc_updates": 0, "bc_learning_rate": 7e-4, "anneal_updates": 1_250}
COMBO = {"rollout_every": 400, "rollout_starts": 2048, "rollout_length": 10, "push_up": "mix"}
COMBO |= {"rollout_generations": 5, "rollout_warm_up": 16, "rollout_epsilon": 0.05}
COMBO |= {"model_share": 0.5, "num_bins": 601}
MZU = {"policy_target": "visits", "mpo_temperature": 0.1, "max_depth": None}
MZU |= {"dirichlet_fraction": 0.25, "eval_dirichlet_fraction": 0.25}
DEFAULTS = {
    "rosmo_atari": TABLE3 | ATARI | ROSMO | {"num_bins": 601},
    "rosmo_bsuite": TABLE4 | BSUITE | ROSMO | {"num_bins": 20},
    "muzero_unplugged_atari": TABLE3 | ATARI | MZU | {"num_simulations": 20, "num_bins": 601},
    "muzero_unplugged_bsuite": TABLE4 | BSUITE | MZU | {"num_simulations": 4, "num_bins": 20},
    "bc_atari": TABLE3,
    "bc_bsuite": TABLE4,
    "crr_atari": TABLE3 | CRR | {"num_bins": 601, "beta": 1.0, "clip_rewards": True},
    "crr_bsuite": TABLE4 | CRR | {"num_bins": 20, "beta": 0.3},
    "cql_atari": TABLE3 | CQL | {"num_bins": 601, "clip_rewards": True},
    "cql_bsuite": TABLE4 | CQL | {"num_bins": 20},
    "morel_atari": PPO | WORLD_MODEL | MOREL,
    "combo_atari": TABLE3 | CQL | WORLD_MODEL | COMBO,
}
PLAYED = {"eval_episodes": 2, "final_eval_episodes": 100, "eval_every": 1_000, "eval_greedy": False}
ON_ATARI = {"channels": 64, "eval_max_frames": 108_000, "dtype": "auto"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_tables_3_and_4_and_of_the_methods_codes(name):
    args = vars(importlib.import_module(name).Args())
    assert not args.get("truncation_as_termination", False)
    expected = PLAYED | (ON_ATARI if name.endswith("_atari") else {}) | DEFAULTS[name]
    assert {key: args[key] for key in expected} == expected


def test_programs_that_uv_runs_have_metadata():
    lacking = {path.stem for path in PROGRAMS if "# /// script" not in path.read_text()}
    assert lacking == {"paper", "report", "run", "throughput", "throughput_loader"}
