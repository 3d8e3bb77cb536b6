"""Learning rate as a function of how much of training is done, so that nothing but the position needs saving."""

from __future__ import annotations

import math

from grasp_sparse.train.config import TrainConfig


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Rate at `progress` (share of training done, 0..1): linear warm-up, then cosine to zero, steps of 1/10, or constant."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    if config.schedule == "cosine":
        done = (progress - config.warmup) / (1 - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    return config.lr


def training_progress(config: TrainConfig, step: int, total_steps: int, seconds: float) -> float:
    """Share of training done: by steps, or by wall time where --max-seconds will end it sooner."""
    by_steps = step / total_steps
    return by_steps if config.max_seconds is None else min(1.0, max(by_steps, seconds / config.max_seconds))
