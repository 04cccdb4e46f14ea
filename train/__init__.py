"""The application on top of flowkern: data, training loops and commands. Needs the extra `flowkern[train]`."""
