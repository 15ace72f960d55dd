"""Stored runs: kept in a folder, compared with a run, and watched for drift."""
