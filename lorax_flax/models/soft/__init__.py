"""Trained states beside a model's weights: prefixes, prompts, bottleneck adapters.

A part is new leaves of the model's tree, which are trained in full. `PARTS` has a row
for each: which leaves, how they start, and PEFT's form of them.
"""

from lorax_flax.models.soft.before import Before, before
from lorax_flax.models.soft.bottleneck import adapted
from lorax_flax.models.soft.settings import PARTS, SoftSettings, places

__all__ = ["PARTS", "Before", "SoftSettings", "adapted", "before", "places"]
