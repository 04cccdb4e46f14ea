"""A Glow inside other libraries' models: a file for each library, which must be installed."""
