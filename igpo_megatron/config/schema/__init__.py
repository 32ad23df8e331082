"""Every setting of a run, with its meaning written under it. Unknown keys and unknown enum values are errors.

Sections follow the path of a question: data -> search -> rollout -> reward -> advantage -> loss -> optim, then what carries them.
Secrets are never stored: a field ending in `_env` names the environment variable that holds one.
"""

from __future__ import annotations

from igpo_megatron.config.schema.algorithm import (
    PUBLISHED_PROBE,
    Advantage,
    Aepo,
    Arpo,
    Bapo,
    Cispo,
    Eapo,
    GiGpo,
    Grpo,
    Gspo,
    Hapo,
    Igpo,
    IgpoLoo,
    Loss,
    PolicyLoss,
    Ppo,
    Rapo,
    ReinforcePp,
    ReinforcePpBaseline,
    ReMax,
    Reward,
    Rloo,
    Sft,
)
from igpo_megatron.config.schema.rollout import AepoBranching, ArpoBranching, Branching, Engine, GainBranching, NoBranching, Rollout
from igpo_megatron.config.schema.section import Section
from igpo_megatron.config.schema.tools import KEY_VARIABLES, Chaos, Python, Search, Summary, Visit
from igpo_megatron.config.schema.training import Checkpoint, Data, Eval, Model, Optim, Packing, Parallel, Placement, Run, Sync, Track

__all__ = [
    "KEY_VARIABLES",
    "PUBLISHED_PROBE",
    "Advantage",
    "Aepo",
    "AepoBranching",
    "Arpo",
    "ArpoBranching",
    "Bapo",
    "Branching",
    "Chaos",
    "Checkpoint",
    "Cispo",
    "Config",
    "Data",
    "Eapo",
    "Engine",
    "Eval",
    "GainBranching",
    "GiGpo",
    "Grpo",
    "Gspo",
    "Hapo",
    "Igpo",
    "IgpoLoo",
    "Loss",
    "Model",
    "NoBranching",
    "Optim",
    "Packing",
    "Parallel",
    "Placement",
    "PolicyLoss",
    "Ppo",
    "Python",
    "Rapo",
    "ReMax",
    "ReinforcePp",
    "ReinforcePpBaseline",
    "Reward",
    "Rloo",
    "Rollout",
    "Run",
    "Search",
    "Section",
    "Sft",
    "Summary",
    "Sync",
    "Track",
    "Visit",
]


class Config(Section):
    """A whole run."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data = Data()
    search: Search = Search()
    visit: Visit = Visit()
    python: Python = Python()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    advantage: Advantage = Igpo()
    loss: Loss = Ppo()
    optim: Optim = Optim()
    packing: Packing = Packing()
    placement: Placement = Placement()
    sync: Sync = Sync()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    track: Track = Track()
