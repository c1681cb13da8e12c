"""What tests and benchmarks share: how close is close enough."""
