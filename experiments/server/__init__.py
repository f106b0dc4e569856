"""The server: OpenAI's API over a base and its adapters. `app` makes it.

`language` and `classifiers` answer, and know no HTTP; the others know no JAX.
"""
