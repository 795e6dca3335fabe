"""The column structured_kd: Structured Knowledge Distillation for Dense Prediction."""
