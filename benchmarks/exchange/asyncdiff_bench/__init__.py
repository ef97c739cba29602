"""``asyncdiff bench``: how fast bundles cross between ranks, beside other ways to move them.

``runner`` starts ``worker`` processes, which build a ``world`` (ranks, streams, a gate), make
``links`` of every way in ``ways``, and run ``cases``. docs/metrics.md defines what is measured.
"""
