"""Hooks that measure, and sinks that take what they measured."""
