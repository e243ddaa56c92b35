"""Every table and figure of the paper as data: what is run, what it shows, the paper's own numbers.

run.py runs an item's cells and report.py draws them; whoever adds an item here can do both with it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

TASKS = ("catch", "mountain_car", "cartpole")
GAMES = ("Amidar", "Asterix", "Breakout", "Frostbite", "Gravitar", "Jamesbond", "MsPacman")
GAMES += ("Phoenix", "Pong", "Qbert", "Riverraid", "Seaquest")

# Mean returns of a random policy and of the online DQN: RL Unplugged's, and Table 6.
REFERENCE_RETURNS = {
    "Alien": (199.8, 2766.81),
    "Amidar": (3.19, 1556.96),
    "Assault": (235.15, 1946.1),
    "Asterix": (279.06, 4131.77),
    "Atlantis": (16973.04, 944228.0),
    "BankHeist": (13.65, 907.72),
    "BattleZone": (2786.8, 26458.99),
    "BeamRider": (362.05, 6453.26),
    "Boxing": (0.79, 84.11),
    "Breakout": (1.33, 157.86),
    "Carnival": (669.55, 5339.46),
    "Centipede": (2181.66, 3972.49),
    "ChopperCommand": (823.14, 3678.15),
    "CrazyClimber": (8173.59, 118080.24),
    "DemonAttack": (166.02, 6517.02),
    "DoubleDunk": (-18.42, -1.22),
    "Enduro": (0.0, 1016.28),
    "FishingDerby": (-93.25, 18.57),
    "Freeway": (0.0, 26.76),
    "Frostbite": (71.99, 1643.65),
    "Gopher": (282.57, 8241.0),
    "Gravitar": (213.71, 310.56),
    "Hero": (719.15, 16233.54),
    "IceHockey": (-9.82, -4.02),
    "Jamesbond": (27.63, 777.73),
    "Kangaroo": (41.3, 14125.11),
    "Krull": (1556.92, 7238.51),
    "KungFuMaster": (556.31, 26637.88),
    "MsPacman": (247.97, 4171.53),
    "NameThisGame": (2401.05, 8645.09),
    "Phoenix": (873.03, 5122.3),
    "Pong": (-20.3, 18.25),
    "Pooyan": (411.36, 4135.32),
    "Qbert": (155.01, 12275.13),
    "Riverraid": (1504.25, 12798.88),
    "RoadRunner": (15.46, 47880.48),
    "Robotank": (2.01, 63.44),
    "Seaquest": (81.78, 3233.47),
    "SpaceInvaders": (149.52, 2044.63),
    "StarGunner": (677.22, 55103.84),
    "TimePilot": (3450.95, 4160.51),
    "UpNDown": (513.94, 15677.92),
    "VideoPinball": (26024.42, 335055.69),
    "WizardOfWor": (686.63, 1787.79),
    "YarsRevenge": (3147.67, 26762.98),
    "Zaxxon": (10.57, 4681.93),
    "catch": (-0.66, 1.0),
    "cartpole": (64.83, 1001.0),
    "mountain_car": (-1000.0, -102.16),
}
# The data of Table 5: transitions and mean return of an episode, by task and noise.
TABLE5 = {
    ("cartpole", 0.0): (630_262, 629.71),
    ("cartpole", 0.1): (779_491, 779.01),
    ("cartpole", 0.3): (787_350, 786.86),
    ("cartpole", 0.5): (527_528, 526.75),
    ("catch", 0.0): (18_000, 0.71),
    ("catch", 0.1): (18_000, 0.60),
    ("catch", 0.3): (18_000, 0.25),
    ("catch", 0.5): (18_000, -0.04),
    ("mountain_car", 0.0): (82_342, -164.68),
    ("mountain_car", 0.1): (147_116, -294.23),
    ("mountain_car", 0.3): (138_262, -276.52),
    ("mountain_car", 0.5): (167_688, -335.37),
}

# Table 8: IQM of the return, and what the paper prints behind ±.
METHODS = ("BC", "CRR", "CQL", "MuZero Unplugged", "ROSMO")
TABLE8_TEXT = """\
Amidar    30.381±8.5       22.143±9.143     51.286±18.821    76.452±31.107    38.405±9.501
Asterix   2633.333±392.857 6344.048±698.214 26890.476±8496.429 29061.905±3667.857 25740.476±3857.143
Breakout  85.143±14.19     218.952±40.571   418.238±27.571   390.119±4.357    440.905±5.774
Frostbite 586.19±145.357   2854.286±113.571 3337.381±544.643 4051.19±107.5    3996.19±223.006
Gravitar  400.0±26.786     345.238±50.0     52.381±26.786    792.857±108.929  753.571±64.821
Jamesbond 402.381±55.357   513.095±46.429   102.381±14.286   602.381±40.878   639.286±44.643
MsPacman  2733.333±237.143 3736.905±214.643 2141.667±386.429 4539.048±546.786 5019.762±608.768
Phoenix   5901.905±198.571 5954.286±581.429 3510.238±1066.429 6103.81±1722.143 21550.476±2689.643
Pong      14.976±1.571     19.095±0.571     18.762±0.595     18.452±1.107     20.452±0.357
Qbert     7497.619±2221.429 12618.452±326.786 13114.286±797.321 13121.429±933.929 15848.81±1049.107
Riverraid 9614.048±528.929 12279.762±280.357 14887.143±1163.214 15156.905±1965.714 19399.286±407.143
Seaquest  1087.143±169.286 3879.048±421.905 2237.619±150.714 6745.238±170.0   6642.857±87.857
"""
TABLE8 = {
    game: [tuple(map(float, number.split("±"))) for number in numbers]
    for game, *numbers in map(str.split, TABLE8_TEXT.splitlines())
}
TABLE7 = {"MOReL": (1476.478, 413.012), "COMBO": (1538.33, 79.62)}
TABLE7 |= {"MuZero Unplugged": (4539.048, 546.786), "ROSMO": (5019.762, 608.768)}
# Fig. 3: the final IQM of the normalised score, and hours until it is 1.5.
FIGURE3 = {"CRR": 1.05, "CQL": 0.835, "MuZero Unplugged": 1.51, "ROSMO": 1.94}
FIGURE3_HOURS = {"ROSMO": 1.0, "MuZero Unplugged": 17.8}


class Cell(NamedTuple):
    """One method with one value on one task; run with several seeds."""

    method: str
    value: Any
    task: str
    script: str
    arguments: dict[str, Any]


class Item(NamedTuple):
    """Cells: every method, with every value of the swept argument, on every task."""

    title: str
    form: Literal["table", "table and curves", "aggregate", "curves", "pooled curves"]
    methods: dict[str, tuple[str, dict]]  # label: script, arguments
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    argument: str | None = None  # the swept one
    values: tuple = (None,)
    axis: str = ""  # what is swept, in words
    column: str = "{}"  # a value in words
    common: dict[str, Any] = {}  # noqa: RUF012
    """arguments of every cell"""
    average: Literal["mean", "IQM"] = "mean"  # of returns, over seeds
    unit: Literal["return", "normalised score"] = "return"  # of curves
    claim: str = ""  # the paper's
    # By (method, value, task): the paper's number, and what stands behind ± there.
    numbers: dict[tuple, tuple[float, float]] = {}  # noqa: RUF012, which is not changed
    level: tuple[float, dict[str, float]] | None = None
    """the score of which a page says when a curve reaches it, and the paper's hours by method"""
    of: str | None = None  # the item whose runs these are
    total_updates: int = 200_000
    needs: dict[str, tuple[str, str]] = {}  # noqa: RUF012
    """label: another method whose folder it needs first, and the argument that names this"""

    def label(self, value) -> str:
        text = f"{value:g}" if isinstance(value, float) else value
        return self.column.format(text) if self.argument else ""

    def cells(self, tasks: tuple[str, ...] | None = None) -> Iterator[Cell]:
        for method, (script, arguments) in self.methods.items():
            for value in self.values:
                for task in tasks or self.tasks:
                    swept = {self.argument: value} if self.argument else {}
                    cell = self.common | arguments | swept | {"env_id": task}
                    yield Cell(method, value, task, script, cell)


def on(domain: str, **methods: tuple[str, dict]) -> dict[str, tuple[str, dict]]:
    """Methods with the whole names of their scripts."""
    return {label: (f"{name}_{domain}", arguments) for label, (name, arguments) in methods.items()}


ALGORITHMS = {"BC": "bc", "CRR": "crr", "CQL": "cql"}
ALGORITHMS |= {"MuZero Unplugged": "muzero_unplugged", "ROSMO": "rosmo"}
FIVE = {k: (v, {}) for k, v in ALGORITHMS.items()}
BOTH = {k: (ALGORITHMS[k], {}) for k in ("ROSMO", "MuZero Unplugged")}
BSUITE = {"seeds": (0, 1, 2, 3, 4)}
ATARI = {"seeds": (0, 1, 2)}
SHARES = {"argument": "data_percent", "axis": "share of the data, %", "column": "{}% of the data"}
FOUR = {"num_simulations": 4}
FIGURE4 = ATARI | {"form": "curves", "tasks": ("MsPacman",), "average": "IQM"}
FIGURE4 |= {"unit": "normalised score"}
ONE_STEP = on("atari", ROSMO=("rosmo", {}), OneStep=("rosmo", {"behavior_coef": 0.0}))
# Breakout on local data: 176 transitions an update, five minutes of play at most.
SMALL = {"dataset": Path("data/atari/Breakout-dqn-60k"), "channels": 16, "batch_size": 176}
SMALL |= {"eval_episodes": 5, "final_eval_episodes": 20, "eval_max_frames": 18_000}
# A world model that two hours of two cores can train.
SMALL_MODEL = {"members": 2, "deter": 128, "hidden": 128, "latents": 16, "classes": 16}
SMALL_MODEL |= {"depth": 12, "head_units": 64, "model_batch_size": 8, "model_length": 12}
SMALL_MODEL |= {"model_learning_rate": 1e-3, "model_updates": 14_000}
# MOReL's policy imitates logged steps until it plays as they do, then learns from 51,200 imagined
# ones. Its threshold is a quantile of as many replayed steps as the default's.
SMALL_MOREL = SMALL_MODEL | {"bc_updates": 1_500, "bc_batch_size": 176, "batch_size": 16}
SMALL_MOREL |= {"rollout_length": 32, "starts": 1, "epochs": 2, "halt_batches": 64}
SMALL_MOREL |= {"anneal_updates": 100, "total_updates": 100, "eval_every": 10}
# The clone alone: a run needs an update, which at this learning rate moves next to nothing.
CLONE = SMALL_MOREL | {"total_updates": 1, "learning_rate": 1e-12}
# Beside the defaults, quantile 0.999 and penalty -10.
MOREL_SWEEP = {f"quantile {x}": {"halt_quantile": x} for x in (0.99, 0.9999)}
MOREL_SWEEP |= {f"penalty {x:g}": {"halt_penalty": x} for x in (-1.0, -50.0)}
MOREL_SWEEP = {f"MOReL, {k}": ("morel", SMALL_MOREL | x) for k, x in MOREL_SWEEP.items()}
SMALL_COMBO = SMALL_MODEL | {"rollout_starts": 64, "rollout_epsilon": 1.0}
SWEEP = {"form": "table", "tasks": ("catch",), "seeds": (0, 1, 2), "total_updates": 20_000}
SWEEP_ATARI = {"form": "curves", "tasks": ("Breakout",), "seeds": (0,), "common": SMALL}
SWEEP_ATARI |= {"total_updates": 5_000}
BETA = {"argument": "beta", "axis": "temperature β", "column": "β = {}"}
WEIGHT = {"argument": "weight", "values": ("exp", "binary")}
WEIGHT |= {"axis": "weight of a logged action", "column": "{} weight"}
ALPHA = {"argument": "cql_alpha", "axis": "weight α of the penalty", "column": "α = {}"}

ITEMS = {
    "table1": Item(
        "Table 1: catch, data of a noisy environment",
        "table",
        on("bsuite", **BOTH),
        ("catch",),
        **BSUITE,
        argument="noise",
        values=(0.0, 0.1, 0.3, 0.5),
        axis="noise ε of the data",
        column="noise ε = {}",
        claim="ROSMO is much less sensitive to the noise than MuZero Unplugged.",
    ),
    "table2": Item(
        "Table 2: the five methods on BSuite",
        "table and curves",
        on("bsuite", **FIVE),
        TASKS,
        **BSUITE,
        claim="ROSMO is best on catch and mountain_car, with the lowest standard deviation; "
        "CRR is slightly better on cartpole, where ROSMO is clearly ahead of the others.",
    ),
    "figure2a": Item(
        "Figure 2(a): shares of the data",
        "aggregate",
        on("bsuite", **BOTH),
        TASKS,
        **BSUITE,
        **SHARES,
        values=(1.0, 10.0, 30.0, 100.0),
        claim="ROSMO is above MuZero Unplugged everywhere, which is poor at 1%.",
    ),
    "figure2b": Item(
        "Figure 2(b): widths of the dynamics function, 10% of the data",
        "aggregate",
        on("bsuite", **BOTH),
        TASKS,
        **BSUITE,
        common={"data_percent": 10.0},
        argument="dynamics_hidden",
        values=(32, 128, 256, 512, 1024),
        axis="hidden units of the dynamics function",
        column="{} hidden units",
        claim="MuZero Unplugged is best at 1024 and falls with less; ROSMO is flat and higher.",
    ),
    "figure2c": Item(
        "Figure 2(c): simulations and depth of MuZero Unplugged's search",
        "aggregate",
        on(
            "bsuite",
            **{
                "depth not limited": ("muzero_unplugged", {}),
                "depth 2": ("muzero_unplugged", {"max_depth": 2}),
                "depth 1": ("muzero_unplugged", {"max_depth": 1}),
            },
        ),
        TASKS,
        **BSUITE,
        argument="num_simulations",
        values=(2, 4, 16, 32),
        axis="simulations N of a search",
        column="N = {}",
        claim="MuZero Unplugged fails at few simulations and with many and deep ones; limiting "
        "the depth helps.",
    ),
    "table8": Item(
        "Table 8: the five methods on Atari",
        "table",
        on("atari", **FIVE),
        GAMES,
        **ATARI,
        average="IQM",
        claim="ROSMO is best over all games together, and on seven of the twelve; MuZero Unplugged "
        "is on the other five.",
        numbers={
            (method, None, game): number
            for game, row in TABLE8.items()
            for method, number in zip(METHODS, row, strict=True)
        },
    ),
    "table7": Item(
        "Table 7: model-based methods on MsPacman",
        "table",
        on(
            "atari",
            MOReL=("morel", {"total_updates": 1_250}),
            COMBO=("combo", {}),
            **{k: BOTH[k] for k in ("MuZero Unplugged", "ROSMO")},
        ),
        ("MsPacman",),
        **ATARI,
        claim="ROSMO is best. (The numbers are means over the seeds, but those of MuZero Unplugged "
        "and ROSMO are Table 8's IQMs.)",
        numbers={(method, None, "MsPacman"): number for method, number in TABLE7.items()},
        needs={"COMBO": ("MOReL", "world_model")},
    ),
    "figure4a": Item(
        "Figure 4(a): MsPacman, small shares of the data",
        methods=on("atari", **BOTH),
        **FIGURE4,
        **SHARES,
        values=(10.0, 1.0),
        claim="ROSMO outperforms MuZero Unplugged with 10% and with 1% of the data.",
    ),
    "figure4b": Item(
        "Figure 4(b): MsPacman, four simulations or samples",
        methods=on(
            "atari",
            **{
                "ROSMO, N = 4": ("rosmo", {"num_samples": 4}),
                "MuZero Unplugged, N = 4": ("muzero_unplugged", FOUR),
                "MZU-Q, N = 4": ("muzero_unplugged", FOUR | {"policy_target": "mpo"}),
            },
        ),
        **FIGURE4,
        claim="MuZero Unplugged fails to learn with four simulations, MZU-Q alleviates this "
        "somewhat, sampled ROSMO performs well.",
    ),
    "figure4c": Item(
        "Figure 4(c): MsPacman, unrolled steps of the model",
        methods=on("atari", **BOTH),
        **FIGURE4,
        argument="unroll_steps",
        values=(5, 1),
        axis="unrolled steps K",
        column="K = {}",
        claim="ROSMO is not sensitive to the number of steps; MuZero Unplugged drops with one.",
    ),
    "figure4d": Item(
        "Figure 4(d): MsPacman, the two parts of ROSMO",
        methods=on(
            "atari",
            ROSMO=("rosmo", {}),
            OneStep=("rosmo", {"behavior_coef": 0.0}),
            Behavior=("rosmo", {"policy_coef": 0.0}),
        ),
        **FIGURE4,
        claim="Behavior learns faster at first and is then surpassed by OneStep; ROSMO is best.",
    ),
    "figure7": Item(
        "Figure 7: ROSMO and OneStep",
        "curves",
        ONE_STEP,
        GAMES,
        **ATARI,
        average="IQM",
        claim="ROSMO converges faster and ends similar or slightly better. (The paper trains "
        "longer than in Fig. 4(d) and names neither the length nor the games: here 200,000 updates "
        "and all games of Table 8.)",
    ),
    "figure8": Item(
        "Figure 8: ROSMO and OneStep, 1% of the data",
        "curves",
        ONE_STEP,
        GAMES,
        **ATARI,
        common={"data_percent": 1.0},
        average="IQM",
        claim="ROSMO is significantly better; both over-fit when training goes on. (The games of "
        "the paper's figure are not named in its text; these are all of Table 8's.)",
    ),
    "atari_small": Item(
        "Five methods on Breakout, small",
        "curves",
        on(
            "atari",  # 16 windows of eleven steps are 176 transitions
            **{k: (v, {"batch_size": 16} if k in BOTH else {}) for k, v in ALGORITHMS.items()},
        ),
        ("Breakout",),
        **ATARI,
        common=SMALL,
        claim="On Breakout at the paper's size: ROSMO 441, CQL 418, MuZero Unplugged 390, "
        "CRR 219, BC 85 (Table 8).",
        total_updates=5_000,
    ),
    "table7_small": Item(
        "Table 7 in miniature: model-based methods on Breakout, small",
        "table",
        on(
            "atari",
            MOReL=("morel", SMALL_MOREL),
            **{"MOReL's clone alone": ("morel", CLONE)},
            **{"COMBO, random rollouts": ("combo", SMALL_COMBO)},
            **{k: (ALGORITHMS[k], {"batch_size": 16}) for k in ("MuZero Unplugged", "ROSMO")},
        ),
        ("Breakout",),
        (0,),
        common=SMALL,
        claim="On MsPacman at the paper's size: ROSMO 5020, MuZero Unplugged 4539, COMBO 1538, "
        "MOReL 1476 (Table 7).",
        total_updates=5_000,
        needs=dict.fromkeys(
            ("MOReL's clone alone", "COMBO, random rollouts"), ("MOReL", "world_model")
        ),
    ),
    "morel_small": Item(
        "MOReL's threshold and penalty on Breakout, small",
        "table and curves",
        on("atari", MOReL=("morel", SMALL_MOREL), **MOREL_SWEEP),
        ("Breakout",),
        (0,),
        common=SMALL,
        total_updates=100,
        needs=dict.fromkeys(MOREL_SWEEP, ("MOReL", "world_model")),
    ),
    "sweep_crr": Item(
        "CRR's β on catch",
        methods=on("bsuite", CRR=("crr", {})),
        **SWEEP,
        **BETA,
        values=(0.1, 0.3, 1.0, 3.0),
    ),
    "sweep_crr_weight": Item(
        "CRR's weight on catch, β = 1",
        methods=on("bsuite", CRR=("crr", {})),
        **SWEEP,
        common={"beta": 1.0},
        **WEIGHT,
    ),
    "sweep_cql": Item(
        "CQL's α and learning rate on catch",
        methods=on(
            "bsuite",
            **{
                "CQL, learning rate 7e-4": ("cql", {"learning_rate": 7e-4}),
                "CQL, learning rate 5e-5": ("cql", {"learning_rate": 5e-5}),
            },
        ),
        **SWEEP,
        **ALPHA,
        values=(0.01, 0.05, 0.1, 0.5, 1.0, 4.0),
    ),
    "sweep_crr_atari": Item(
        "CRR's β on Breakout, small",
        methods=on("atari", CRR=("crr", {})),
        **SWEEP_ATARI,
        **BETA,
        values=(0.1, 0.3, 1.0),
    ),
    "sweep_crr_weight_atari": Item(
        "CRR's weight on Breakout, small, β = 1",
        methods=on("atari", CRR=("crr", {})),
        **SWEEP_ATARI | {"common": SMALL | {"beta": 1.0}},
        **WEIGHT,
    ),
    "sweep_cql_atari": Item(
        "CQL's α on Breakout, small",
        methods=on("atari", CQL=("cql", {})),
        **SWEEP_ATARI,
        **ALPHA,
        values=(0.1, 1.0, 4.0),
    ),
}
ITEMS["figure3"] = ITEMS["table8"]._replace(
    title="Figure 3: the five methods on Atari, over all games",
    form="pooled curves",
    unit="normalised score",
    claim="The IQM of the normalised score ends at 194% with ROSMO, 151% with MuZero Unplugged, "
    "105% with CRR and 83.5% with CQL, all above BC; ROSMO reaches 150% after 1 hour, MuZero "
    "Unplugged after 17.8 hours.",
    numbers={(method, None, "IQM"): (number, float("nan")) for method, number in FIGURE3.items()},
    level=(1.5, FIGURE3_HOURS),
    of="table8",
)
ITEMS["figure6"] = ITEMS["table8"]._replace(
    title="Figure 6: the five methods on each game", form="curves", of="table8"
)
ITEMS["figure9"] = ITEMS["table1"]._replace(
    title="Figure 9: catch, data of a noisy environment", form="curves", of="table1"
)
ITEMS["figure10"] = ITEMS["figure2b"]._replace(
    title="Figure 10: widths of the dynamics function, 10% of the data",
    form="curves",
    of="figure2b",
)
