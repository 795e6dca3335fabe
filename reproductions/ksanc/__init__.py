"""The column ksanc: Knowledge Squeezed Adversarial Network Compression."""
