"""Fault drills: the project's programs are killed at random moments, and nothing may be lost by it."""
