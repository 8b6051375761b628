"""What a run measures, a line a step."""

from qsdp.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter"]
