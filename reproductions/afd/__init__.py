"""The column afd: Feature-map-level Online Adversarial Knowledge Distillation."""
