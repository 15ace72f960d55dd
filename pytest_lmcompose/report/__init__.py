"""Reports of a run: JSON, HTML, Markdown, LaTeX, JUnit properties, W&B and the terminal tables."""
