"""What the methods of the category `compress` compute with."""
