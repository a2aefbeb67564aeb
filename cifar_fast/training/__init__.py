"""One training run: the network, the batches, the step, the loop, the result."""
