"""The workshop beside the library: the demonstration, the study, pages of figures and benchmarks of tasks."""
