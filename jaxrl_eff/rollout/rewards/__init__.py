"""Rewards without a model: functions from text to a number."""
