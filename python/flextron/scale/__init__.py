"""What a training step takes, on paper: memory of a rank, traffic between ranks, time."""
