"""What the methods of the category `tune` compute with."""
