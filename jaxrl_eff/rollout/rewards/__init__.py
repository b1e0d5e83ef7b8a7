"""Rewards that need no model: text in, number out."""
