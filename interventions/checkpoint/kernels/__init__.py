"""What the methods of this category compute with."""
