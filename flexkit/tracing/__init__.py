"""Recording what a patched model looked at."""

from flexkit.tracing.trace import Step, Trace, trace

__all__ = ["Step", "Trace", "trace"]
