"""Measuring memory and time."""
