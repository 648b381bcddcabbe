"""`delivery_job`: plan, then one step per target side by side, then conclude."""

import dagster as dg

from pipelines.ahead import PRELOAD
from pipelines.delivery.ops import conclude_delivery, deliver_to_target, plan_deliveries

# More than there are targets, so that one that hangs never takes another's slot. Steps mostly wait, for the network.
_MOST_STEPS = 128

STEPS_SIDE_BY_SIDE = dg.multiprocess_executor.configured(
    {"max_concurrent": _MOST_STEPS, "start_method": {"forkserver": {"preload_modules": PRELOAD}}}
)


@dg.job(executor_def=STEPS_SIDE_BY_SIDE)
def delivery_job() -> None:
    """Deliver to every target what it is owed."""
    plans, scope = plan_deliveries()
    conclude_delivery(scope, plans.map(deliver_to_target).collect())
