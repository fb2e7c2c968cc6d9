"""A scale model: the real routing, queues and gossip of up to a thousand nodes on virtual time.

`python -m tests.scale` runs it and draws what it found; see docs/scheduling.md.
"""
