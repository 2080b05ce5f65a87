"""g -> x: searches over inputs, latents or tokens."""

from gradlab.transforms.inputs._noise_levels import edm_sigmas as edm_sigmas
from gradlab.transforms.inputs._noise_levels import log_sigmas as log_sigmas
from gradlab.transforms.inputs.evodiff import evodiff as evodiff
from gradlab.transforms.inputs.evodiff import evodiff_sample as evodiff_sample
from gradlab.transforms.inputs.fgsm import fgsm as fgsm
from gradlab.transforms.inputs.fgsm import fgsm_with_trace as fgsm_with_trace
from gradlab.transforms.inputs.pgd import pgd as pgd
