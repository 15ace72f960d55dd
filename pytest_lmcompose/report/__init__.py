"""What a run leaves behind: a JSON document and a table on the terminal."""
