"""Mistakes of public toolboxes that belong to no column; an experiment there is none."""
