"""Search for compositions near one that was asked for: `lmcompose repair` and `lmcompose tune`."""
