"""Tests of dibit.train, dibit.tools.memory and the command."""
