"""Python's garbage collector in a command that trains."""

import gc

# New objects between two collections. Imports and traces make millions that stay.
_OBJECTS = 50_000


def seldom() -> None:
  """Lets it run seldom from now on."""
  gc.set_threshold(_OBJECTS)
