"""Coverage-guided fuzzing of what reads other hosts' bytes: `make fuzz SECONDS=60`.

`targets.py` says what must hold for any bytes; `tests/unit/test_wire_fuzz.py` checks the same for a
few hundred inputs in every run of the tests, and `__main__.py` for millions, with atheris.
"""
