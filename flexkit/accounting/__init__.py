"""What reading closer costs, for models of any size, without their weights."""

from flexkit.accounting.cost import Cost, cost
from flexkit.accounting.known import KNOWN

__all__ = ["KNOWN", "Cost", "cost"]
