"""Generations: the phases, steps and branches of one, its report, and whole ones."""
