"""The column concept_quantification: Explaining Knowledge Distillation by Quantifying the Knowledge."""
