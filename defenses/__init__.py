"""Defenses, each in one file, and what they share: copies, neighbours, seeding."""
