"""Tests of dibit.experiments."""
