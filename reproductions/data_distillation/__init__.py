"""The column data_distillation: Data Distillation: Towards Omni-Supervised Learning."""
