"""Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer (ECCV 2018)."""
