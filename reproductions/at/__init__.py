"""The column at: Paying More Attention to Attention."""
