"""Decisions and formats without input or output: no async, no threads, no operating system, no clock."""
