"""Recipes: what to ask the teacher, how to read its answers, and which rows come of them.

Each recipe is a generator of rows and of `Dropped` rows. It asks through an `Asker`, which keeps its account, and is
handed whatever it needs of the rooms above this one (a novelty filter, a retriever). It keeps no state: the response
store has every answer, so that a recipe that is run again gets the same answers and goes on where it was.
"""
