"""QUEST: quantised feature spaces."""
