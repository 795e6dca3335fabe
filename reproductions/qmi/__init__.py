"""The quadratic mutual information between features and labels, and whether PKT transfers it."""
