"""Measuring layers and whole training steps, sparse against dense: what the benchmarks and `grasp-sparse bench` share."""
