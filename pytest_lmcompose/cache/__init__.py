"""Finished work under content addresses: what is never computed twice."""
