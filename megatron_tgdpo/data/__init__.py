"""Preference data: files in, token pairs out. Import the submodules; this package imports nothing by itself."""
