"""g -> importance: scores of parameters, units, examples and tokens."""

from gradlab.transforms.scores.keep_mask import apply_mask as apply_mask
from gradlab.transforms.scores.keep_mask import collapsed as collapsed
from gradlab.transforms.scores.keep_mask import keep_mask as keep_mask
from gradlab.transforms.scores.magnitude import magnitude as magnitude
from gradlab.transforms.scores.snip import snip as snip
from gradlab.transforms.scores.snip import snip_mask as snip_mask
