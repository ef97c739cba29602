"""Plans as data: actions, both schedules, text, simulation, picture.

Knows neither torch nor devices.
"""
