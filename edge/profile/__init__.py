"""Measures what a machine can run: each case in a process of its own, sampled from outside."""
