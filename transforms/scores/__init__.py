"""g -> importance: scores of parameters, units, examples and tokens."""

from gradlab.transforms.scores.keep_mask import apply_mask as apply_mask
from gradlab.transforms.scores.keep_mask import collapsed as collapsed
from gradlab.transforms.scores.keep_mask import keep_mask as keep_mask
from gradlab.transforms.scores.magnitude import magnitude as magnitude
from gradlab.transforms.scores.reloop2 import compensate as compensate
from gradlab.transforms.scores.reloop2 import error_memory_init as error_memory_init
from gradlab.transforms.scores.reloop2 import error_memory_read as error_memory_read
from gradlab.transforms.scores.reloop2 import error_memory_write as error_memory_write
from gradlab.transforms.scores.reloop2 import error_sketch_init as error_sketch_init
from gradlab.transforms.scores.reloop2 import error_sketch_read as error_sketch_read
from gradlab.transforms.scores.reloop2 import error_sketch_write as error_sketch_write
from gradlab.transforms.scores.reloop2 import reloop2 as reloop2
from gradlab.transforms.scores.snip import snip as snip
from gradlab.transforms.scores.snip import snip_mask as snip_mask
