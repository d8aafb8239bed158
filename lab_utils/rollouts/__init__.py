"""Samples of the model's own: prompts, samplers, their write-ahead log, and what answers are worth.

``in_process`` samples with the trained model, ``server`` with any OpenAI-compatible one; ``rewards`` scores answers,
``advantages`` compares them. Nothing here knows the engine.
"""
