"""{g_i} -> g: aggregators of stacked gradients, ``Aggregator(init, update)``."""

from gradlab.transforms.aggregators.mean import mean as mean
from gradlab.transforms.aggregators.pcgrad import PCGradState as PCGradState
from gradlab.transforms.aggregators.pcgrad import pcgrad as pcgrad
