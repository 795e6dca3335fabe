"""The column kd: Distilling the Knowledge in a Neural Network."""
