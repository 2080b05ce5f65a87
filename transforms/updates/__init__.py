"""g -> u: update rules, as optax gradient transformations."""

from gradlab.transforms.updates.adamw import adamw as adamw
from gradlab.transforms.updates.adan import adan as adan
from gradlab.transforms.updates.adan import scale_by_adan as scale_by_adan
from gradlab.transforms.updates.diffgrad import diffgrad as diffgrad
from gradlab.transforms.updates.diffgrad import scale_by_diffgrad as scale_by_diffgrad
from gradlab.transforms.updates.sinkgd import col_l2 as col_l2
from gradlab.transforms.updates.sinkgd import frobenius as frobenius
from gradlab.transforms.updates.sinkgd import multi_normalize as multi_normalize
from gradlab.transforms.updates.sinkgd import row_l2 as row_l2
from gradlab.transforms.updates.sinkgd import scale_by_multi_norm as scale_by_multi_norm
from gradlab.transforms.updates.sinkgd import scale_by_sinkgd as scale_by_sinkgd
from gradlab.transforms.updates.sinkgd import scale_by_swan as scale_by_swan
from gradlab.transforms.updates.sinkgd import sign as sign
from gradlab.transforms.updates.sinkgd import sinkgd as sinkgd
from gradlab.transforms.updates.sinkgd import spectral as spectral
from gradlab.transforms.updates.sinkgd import sr_sinkhorn as sr_sinkhorn
