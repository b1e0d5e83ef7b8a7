"""Resharding: arrays moved from one mesh to another, whole or by what has changed."""
