"""The column nst: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer."""
