"""Pure protocol code (sans-I/O): frames, messages, handshake state machines.

Nothing in here imports trio, socket, time or random: bytes go in, events and bytes come out.
"""
