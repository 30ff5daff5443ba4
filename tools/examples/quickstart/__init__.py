"""The quickstart's demonstration: an artificial language, a base model for it, and the table that compares models."""
