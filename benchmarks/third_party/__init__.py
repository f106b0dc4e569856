"""Small models of other people's libraries: a file a framework, names to builders."""

FRAMEWORKS = ("linen", "transformers_flax", "nnx", "equinox", "haiku", "others")

# Distributions that the models come from, of the extra `third_party`.
LIBRARIES = (
  "flax", "transformers", "flaxmodels", "nano-moe-jax", "e3nn-jax",
  "mamba2-jax", "mamba3-jax", "jaxkan", "jraphx", "attnax", "equinox", "equimo",
  "jaxonmodels", "flowjax", "diffrax", "dm-haiku", "jraph", "distrax", "keras",
  "penzai", "inox",
)  # fmt: skip
