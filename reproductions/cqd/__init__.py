"""The column cqd: Adapting Models to Signal Degradation using Distillation."""
