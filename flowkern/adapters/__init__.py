"""A Glow inside other flow libraries' models: one thin file for each library, which must be installed."""
