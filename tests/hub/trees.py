"""Our trees of a torch model's weights, by a key map, without our loader."""

import jax.numpy as jnp
import numpy as np

from lorax_flax.hub.checkpoints.keymap import full_key


def params(model, keymap):
  """The tree that `keymap` describes, layers stacked where it scans."""
  stored = {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}
  tree = {}
  for path, keys in keymap.keys.items():
    sites = [keymap.sites[key] for key in keys]
    values = [
      site.entry.form.to_ours(stored[full_key(keymap, key)])
      for key, site in zip(keys, sites, strict=True)
    ]
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(np.stack(values) if sites[0].index else values[0])
  return tree
