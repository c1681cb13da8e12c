"""From a model to its budgets: profile it, train the routers, calibrate them."""
