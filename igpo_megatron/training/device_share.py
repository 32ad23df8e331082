"""Whether the policy or the engines have the devices. They take turns with `placement.mode=colocated`; otherwise nothing is done here.

    policy   train ─ export ┐ away ....................... back ┌ score, train ─ export ┐ away
    engines  asleep ─ weights ┘ kv cache ─ canary ─ rollouts ─ asleep                 weights ┘ kv cache ─ ...

The order is the safe one: engines sleep when their last request has ended; they take memory for weights before the export, and for the KV
cache only when the policy has left on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpo_megatron.config.schema import Config

if TYPE_CHECKING:
    from igpo_megatron.engines.api import EngineService
    from igpo_megatron.policy.policy import Policy


class DeviceShare:
    """Collective: every rank calls every method at the same point."""

    def __init__(self, config: Config, policy: Policy) -> None:
        from igpo_megatron.policy.offload import Offload

        self.is_shared = config.placement.mode == "colocated" and config.run.replay is None
        self._policy, self._offload = policy, Offload(policy)

    def policy_leaves(self) -> None:
        """The ranks' memory is free when this returns, on all of them."""
        from igpo_megatron.policy import parallel

        if self.is_shared and not self._offload.is_away:
            self._offload.leave()
            parallel.barrier()

    def policy_returns(self, engines: EngineService | None) -> None:
        """The engines go to sleep, then the policy comes back. Only the main rank has `engines`."""
        from igpo_megatron.policy import parallel

        if self.is_shared and self._offload.is_away:
            parallel.on_main(self._policy.ranks, lambda: engines.sleep() if engines is not None else None)
            self._offload.come_back()
