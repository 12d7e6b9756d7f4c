"""Published numbers that follow from stated settings without training, and what follows from them here.

The one idea: a claim is a line in a table (`counts`, `arithmetic`), and counts of parameters go through the very code
that tunes models, on the meta device (`subjects`). What a claim is and when it agrees is in `claim`.
"""
