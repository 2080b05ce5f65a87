"""g -> x: searches over inputs, latents or tokens."""

from gradlab.transforms.inputs.fgsm import fgsm as fgsm
from gradlab.transforms.inputs.fgsm import fgsm_with_trace as fgsm_with_trace
from gradlab.transforms.inputs.pgd import pgd as pgd
