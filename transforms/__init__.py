"""Every method, one folder per signature; all names are importable from here."""

from gradlab.transforms.aggregators import *  # noqa: F403
from gradlab.transforms.compressors import *  # noqa: F403
from gradlab.transforms.controllers import *  # noqa: F403
from gradlab.transforms.cotangents import *  # noqa: F403
from gradlab.transforms.estimators import *  # noqa: F403
from gradlab.transforms.inputs import *  # noqa: F403
from gradlab.transforms.objectives import *  # noqa: F403
from gradlab.transforms.params import *  # noqa: F403
from gradlab.transforms.scores import *  # noqa: F403
from gradlab.transforms.updates import *  # noqa: F403
