"""Measurements and corrections of instances, as pure functions."""
