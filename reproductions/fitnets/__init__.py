"""The column fitnets: FitNets: Hints for Thin Deep Nets."""
