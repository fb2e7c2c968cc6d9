"""Mixed load with random kills for as long as one likes: what must not grow is measured.

`python -m tests.soak --minutes 30`; CI runs two minutes of it (`tests/system/test_soak.py`).
"""
