"""Runs, ledger, claims, errata and provenance: the way from a training to a cited number."""
