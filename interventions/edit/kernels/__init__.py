"""What the methods of the category `edit` compute with."""
