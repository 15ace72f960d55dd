"""Load pytest's own plugin for testing plugins; lmcompose itself comes by its entry point."""

pytest_plugins = ["pytester"]
