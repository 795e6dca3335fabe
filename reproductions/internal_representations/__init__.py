"""Aguilar et al., Knowledge Distillation from Internal Representations (AAAI 2020)."""
