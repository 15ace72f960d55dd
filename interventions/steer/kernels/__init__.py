"""Computations of the methods of the category `steer`."""
