"""Generation of text: settings, search, sampling, and text from tokens."""
