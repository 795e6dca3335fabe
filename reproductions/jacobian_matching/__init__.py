"""The column jacobian_matching: Knowledge Transfer with Jacobian Matching."""
