"""batch -> loss: functions of (model outputs, batch) that return (scalar, aux)."""

from gradlab.transforms.objectives.cross_entropy import cross_entropy as cross_entropy
from gradlab.transforms.objectives.next_token import next_token as next_token
from gradlab.transforms.objectives.squared_error import squared_error as squared_error
