"""theta -> theta: functions on parameter trees."""

from gradlab.transforms.params.magnitude_prune import magnitude_prune as magnitude_prune
