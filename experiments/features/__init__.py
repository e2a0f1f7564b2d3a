"""Figures 4 to 7 of the paper: how well the stages separate questions and answers."""
