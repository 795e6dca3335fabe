"""Chen, Wang and Zhang, DarkRank: Deep Metric Learning via Cross Sample Similarities Transfer (AAAI 2018)."""
