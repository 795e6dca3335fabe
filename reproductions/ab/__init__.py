"""The column ab: Knowledge Transfer via Distillation of Activation Boundaries."""
