"""Plans as data: actions, the schedules, text, simulation, picture.

Knows neither torch nor devices.
"""
