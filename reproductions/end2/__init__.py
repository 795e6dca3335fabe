"""The column end2: Ensemble Distribution Distillation."""
