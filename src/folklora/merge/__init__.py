"""Many models into one: a method is a function of the tensors of one name; `contract.py` says what of."""

from folklora.merge.average import average
from folklora.merge.contract import PerTask
from folklora.merge.slerp import slerp
from folklora.merge.task_arithmetic import task_arithmetic

__all__ = [
    "PerTask",
    "average",
    "slerp",
    "task_arithmetic",
]
