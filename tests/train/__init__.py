"""Tests of dibit.train, dibit.bench.memory and the command."""
