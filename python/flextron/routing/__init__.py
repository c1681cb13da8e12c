"""From a model to its budgets: latency table, surrogate, routers, ladder, planner."""

from flextron.routing.budget import Planner
from flextron.routing.ladder import Ladder, router_ladder, uniform_ladder
from flextron.routing.latency import LatencyTable, Workload, load_tables, measure, profile, save_tables
from flextron.routing.trainer import RouterResult, train_routers

__all__ = [
    "Ladder",
    "LatencyTable",
    "Planner",
    "RouterResult",
    "Workload",
    "load_tables",
    "measure",
    "profile",
    "router_ladder",
    "save_tables",
    "train_routers",
    "uniform_ladder",
]
