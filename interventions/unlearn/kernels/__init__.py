"""What the methods of the category `unlearn` compute with."""
