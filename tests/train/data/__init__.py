"""Tests of dibit.train.data: what is read of a data set, and what is refused."""
