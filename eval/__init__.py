"""Evaluation: extraction attack, image quality, report."""
