"""What a job imports late: the process that workers are forked from has it already."""

import flax.nnx
import sklearn.datasets
import tensorboardX

from gradlab.launch._sweep import worker

__all__ = ["flax", "sklearn", "tensorboardX", "worker"]
