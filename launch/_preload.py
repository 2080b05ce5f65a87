"""What a job imports late: the process that workers are forked from has it already."""

import flax.nnx
import sklearn.datasets
import tensorboardX

from gradlab.launch import _worker

__all__ = ["_worker", "flax", "sklearn", "tensorboardX"]
