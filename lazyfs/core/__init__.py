"""Decisions and formats, without any input or output.

The modules here use neither async functions nor threads, and neither the operating system nor a
clock.
"""
