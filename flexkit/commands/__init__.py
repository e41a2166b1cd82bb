"""The commands of ``flexkit``, one a file: what each takes, and what it does."""

from flexkit.commands.cost import add_cost
from flexkit.commands.demo import add_demo
from flexkit.commands.evaluate import add_eval
from flexkit.commands.inspect import add_inspect
from flexkit.commands.trace import add_trace
from flexkit.commands.train import add_train

__all__ = ["COMMANDS"]

COMMANDS = (add_cost, add_demo, add_eval, add_inspect, add_trace, add_train)
"""Each adds itself to the parser, with a default ``run`` that takes the parsed options."""
