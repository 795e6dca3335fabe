"""The column logit_regression: Do Deep Nets Really Need to be Deep?"""
