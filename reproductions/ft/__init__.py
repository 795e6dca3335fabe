"""The column ft: Paraphrasing Complex Network: Network Compression via Factor Transfer."""
