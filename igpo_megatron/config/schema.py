"""Every setting of a run, with its meaning written under it. Unknown keys and unknown enum values are errors.

Sections follow the path of a question: data -> search -> rollout -> reward -> advantage -> loss -> optim, then what carries them.
Secrets are never stored: a field ending in `_env` names the environment variable that holds one.
"""

from __future__ import annotations

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.algorithms.advantages.registry import Advantage
from igpo_megatron.algorithms.advantages.turn import Igpo
from igpo_megatron.algorithms.losses.registry import Loss, Ppo
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.data.settings import Data
from igpo_megatron.observability.settings import Track
from igpo_megatron.packing.settings import Packing
from igpo_megatron.policy.settings import Checkpoint, Model, Optim, Parallel
from igpo_megatron.search.settings import Search
from igpo_megatron.settings import Section
from igpo_megatron.tools.settings import Python, Visit
from igpo_megatron.training.settings import Eval, Placement, Run
from igpo_megatron.weights.settings import Sync


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
