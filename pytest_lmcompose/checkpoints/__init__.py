"""Write, verify and gate checkpoint folders."""
