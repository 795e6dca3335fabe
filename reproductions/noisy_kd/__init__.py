"""The column noisy_kd: Improving Generalization and Robustness with Noisy Collaboration in Knowledge Distillation."""
