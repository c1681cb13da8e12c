"""An elastic checkpoint behind vLLM's server: budgets of requests, and the model that keeps to them."""
